"""Factors on the weights: the recorded case of URPE, and what they change that a bias cannot."""

import re

import parity
import pytest
import reference
import torch
from torch import nn

from models.attention import Grid, Site
from models.attention.biases.rpb import rpb
from models.attention.factors.soft_mask import soft_mask
from models.attention.factors.urpe import urpe
from models.attention.softmax import softmax_attention

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")
KINDS = ("weight", "bias")


@pytest.mark.parametrize("name", [name for name in reference.cases("module") if name.startswith("urpe/")])
def test_urpe(name):
    """On a row of tokens, beside a bias of the same form; both tables are (2N − 1, M), key minus query."""
    hparams = reference.info(name)["hparams"]
    site = Site(hparams["embed_dim"], hparams["num_heads"], Grid(1, hparams["n"]), 0, 0, 1, "vit")
    module = softmax_attention(site, bias=rpb, factor=urpe)

    def state(theirs):
        parts = [f"attn.{part}_proj" for part in "qkv"]
        ours = {f"qkv.{kind}": torch.cat([theirs[f"{part}.{kind}"] for part in parts]) for kind in KINDS}
        ours |= {f"proj.{kind}": theirs[f"attn.out_proj.{kind}"] for kind in KINDS}
        tables = {"bias": "rp_bias", "factor": "ur_rp_bias"}
        return ours | {f"core.{key}.table": theirs[f"{value}.weight"].mT[:, None] for key, value in tables.items()}

    parity.check(name, module, state, lambda module, x: module(x, site.grid).x)


def test_urpe_is_softmax_at_the_start():
    base, ours = softmax_attention(SITE), softmax_attention(SITE, factor=urpe)
    ours.load_state_dict(base.state_dict() | {"core.factor.table": ours.core.factor.table})
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(ours(x, SITE.grid).x, base(x, SITE.grid).x)


def test_urpe_tells_places_apart_in_a_constant_sequence_and_a_bias_cannot():
    x = torch.randn(1, 1, 16).expand(1, 20, 16)
    for parts, differs in (({"bias": rpb}, False), ({"factor": urpe}, True)):
        mixer = softmax_attention(SITE, **parts)
        nn.init.normal_(getattr(mixer.core, next(iter(parts))).table)
        y = mixer(x, SITE.grid).x
        assert torch.allclose(y, y[:, :1].expand_as(y), atol=1e-5) != differs


def test_prefix_tokens_keep_a_factor_of_one():
    for part in (urpe(SITE), soft_mask(SITE)):
        factor = part(SITE.grid._replace(prefix=1), SITE.grid._replace(prefix=1))
        assert factor.shape == (2, 21, 21) and (factor[:, 0] == 1).all() and (factor[:, :, 0] == 1).all()


def test_class_tokens_that_come_last_are_later_than_the_map():
    grid, tril = SITE.grid._replace(prefix=2), torch.ones(22, 22).tril()
    order = [*range(2, 22), 0, 1]
    factor = soft_mask(SITE, rho=0.25, prefix="last")(grid, grid)[:, order][:, :, order]
    assert torch.equal(factor, (tril + 0.25 * (1 - tril)).expand(2, 22, 22))


def test_the_soft_mask_is_in_raster_order_and_leaves_the_sum_as_it_was():
    part = soft_mask(SITE, rho=0.25)
    tril = torch.ones(20, 20).tril()
    assert torch.equal(part(SITE.grid, SITE.grid)[0], tril + 0.25 * (1 - tril))
    mixer = softmax_attention(SITE, factor=lambda site: soft_mask(site))
    A = mixer.attention_matrix(torch.randn(1, 20, 16), SITE.grid)
    assert not A.triu(1).any() and (A.sum(-1)[..., :-1] < 1).all() and not mixer.core.row_stochastic


@pytest.mark.parametrize("rho", [-0.5, 1.5, "x"])
def test_wrong_options_are_named(rho):
    text = re.escape(f"soft_mask: rho must be a number between 0 and 1, got {rho!r}; set attention.factor.rho")
    with pytest.raises(ValueError, match=text):
        soft_mask(SITE, rho=rho)
    with pytest.raises(ValueError, match=r"soft_mask: prefix must be open or last, got 'x'; set attention.factor.pref"):
        soft_mask(SITE, prefix="x")
