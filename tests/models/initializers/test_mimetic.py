"""Mimetic initialisation: the recorded products, and what the projections of a model then are."""

from functools import partial

import numpy as np
import parity
import pytest
import reference
import torch

from models.attention import mixers_of
from models.attention.softmax import softmax_attention
from models.backbones.vit import ViT
from models.initializers.mimetic import mimetic, product, split
from models.layers.sinusoid import position_table


def vit(attention=softmax_attention, **options):
    return ViT(attention, 16, 5, patch_size=4, dim=48, depth=2, num_heads=3, **options)


@pytest.mark.parametrize("name", [n for n in reference.cases("module") if n.startswith("mimetic/")])
def test_equals_the_recorded_products(name):
    hparams, noise = reference.info(name)["hparams"], reference.model_input(name)
    made = product(noise, hparams["alpha"], hparams["sign"] * hparams["beta"])
    left, right = split(made, hparams.get("head_dim", len(noise)))
    assert reference.compare(name, "output", left @ right) <= parity.OUTPUT
    if "applied_proj_v" in reference.arrays(name):
        # singular vectors come in pairs of either sign, so entries off the diagonal do too
        applied, recorded = (right @ left).flatten(), np.abs(reference.arrays(name)["applied_proj_v"])
        sample = applied[np.linspace(0, len(applied) - 1, recorded.size).astype(np.int64)]
        np.testing.assert_allclose(sample.abs(), recorded, atol=1e-5)


def products(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """W_Q W_Kᵀ of every head (M, C, C), and W_V W_proj (C, C), of each mixer."""
    found = []
    for _, mixer in mixers_of(model):
        q, k, v = mixer.qkv.weight.detach().chunk(3)
        q_MDC, k_MDC = (part.unflatten(0, (mixer.num_heads, -1)) for part in (q, k))
        found.append((q_MDC.mT @ k_MDC, v.T @ mixer.proj.weight.detach().T))
    return found


def test_tokens_look_at_their_like_and_a_part_of_them_is_taken_away():
    model = vit(initializer=mimetic)
    for qk_MCC, vproj_CC in products(model):
        diagonal = qk_MCC.diagonal(dim1=-2, dim2=-1).mean(-1)
        off = qk_MCC.masked_fill(torch.eye(48).bool(), 0).std()
        assert (diagonal > 3 * off).all()  # cut to a third of the rank: 0.22 of 0.7
        assert vproj_CC.trace() / 48 == pytest.approx(-0.4, abs=0.05)
        assert vproj_CC.diagonal().std() < 0.1  # noise of 0.4 / √48
    heads = products(model)[0][0]
    assert not torch.allclose(heads[0], heads[1])
    biases = [p for name, p in model.named_parameters() if name.endswith(("qkv.bias", "attn.proj.bias"))]
    assert len(biases) == 4 and not any(bias.any() for bias in biases)


def test_without_the_transposes_the_trace_is_right_and_the_matrix_is_not():
    model = vit(initializer=partial(mimetic, as_circulated=True))
    for _, vproj_CC in products(model):
        assert vproj_CC.trace() / 48 == pytest.approx(-0.4, abs=0.05)
        assert vproj_CC.diagonal().std() > 0.15


def test_without_noise_it_is_the_identity():
    model = vit(initializer=partial(mimetic, alpha_v=0.0, beta_v=0.5))
    torch.testing.assert_close(products(model)[0][1], -0.5 * torch.eye(48), rtol=1e-5, atol=1e-5)


def test_position_tables_and_wide_heads():
    table = vit(initializer=partial(mimetic, position=True)).stem.position.table
    assert torch.equal(table[:, 1:], position_table(4, 4, 48))
    narrow = vit(partial(softmax_attention, head_dim=8), initializer=mimetic)
    assert products(narrow)[0][1].trace() / 48 < -0.2
    with pytest.raises(ValueError, match=r"no more channels than tokens, .*, got 48 → 96 → 48 in .*; set init"):
        vit(partial(softmax_attention, head_dim=32), initializer=mimetic)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha_qk": -1}, "mimetic: alpha_qk must be a number of at least 0, got -1; set initializer.alpha_qk"),
        ({"beta_v": "x"}, "mimetic: beta_v must be a number of at least 0, got 'x'; set initializer.beta_v"),
        ({"position": 1}, "mimetic: position must be true or false, got 1; set initializer.position"),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        vit(initializer=partial(mimetic, **options))
