"""Keys that a predictor chooses: against the recorded cases, softmax attention, and what the paper says of them."""

import math
from typing import Any

import parity
import pytest
import reference
import torch
from omegaconf import OmegaConf
from torch import Tensor

from conf.names import CONF
from models import create_model
from models.attention import Grid, Mixer, Refused, Site
from models.attention.biases.relative import relative
from models.attention.layouts.predicted import reconstruction
from models.attention.mixers.sparsifiner import sparsifiner_attention
from models.attention.softmax import softmax_attention
from models.attention.weights.sigmoid import sigmoid
from models.callbacks.freezing import Freezing
from models.layers.block import recomputed

MAP = Grid(6, 9, prefix=1)
SITE = Site(dim=32, num_heads=4, grid=MAP, stage=0, block=0, depth=2, kind="vit")
CASES = [name for name in reference.cases("module") if name.startswith("sparsifiner/")]


def built(name: str) -> Mixer:
    """The authors' class token and 49 tokens are a map of one row behind it."""
    h = reference.info(name)["hparams"]
    site = SITE._replace(dim=h["dim"], num_heads=h["num_heads"], grid=Grid(1, h["num_tokens"] - 1, 1))
    by_share = h.get("SPAR.ATTN_SCORE.USE_TOPK", True)
    few = h["SPAR.BASIS_COEF.TOPK"] if h.get("SPAR.BASIS_COEF.USE_TOPK") else h.get("SPAR.BASIS_COEF.THRESHOLD")
    return sparsifiner_attention(
        site,
        keep=h["attn_keep_rate"] if by_share else None,
        threshold=None if by_share else h["SPAR.ATTN_SCORE.THRESHOLD"],
        basis_threshold=h.get("SPAR.BASIS_THRESHOLD", 0.0),
        coefficients=few or None,
        reduce_tokens=h.get("reduce_n_factor", 8),
        reduce_channels=h.get("reduce_c_factor", 2),
        shared=h.get("share_inout_proj", False),
        phase="reconstruction" if h.get("LOSS.USE_ATTN_RECON") else "masked",
        qkv_bias=h["qkv_bias"],
    )


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in theirs.items():
        key = name.replace("mask_predictor.", "content.")
        table = key.endswith(("proj_n", "proj_back_n"))
        found[f"{key}.table" if table else key] = value[None] if table else value
    return found


def loaded(name: str) -> Mixer:
    mixer = built(name)
    mixer.load_state_dict(ours(reference.weights(name)))
    return mixer.eval()


def test_the_cases_are_found() -> None:
    assert len(CASES) >= 3


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_authors(name: str) -> None:
    """In the first phase, which computes otherwise in training, as in training."""
    case, mixer = reference.info(name), built(name)
    trains = case["mode"] == "train"
    parity.check(name, mixer, ours, lambda mixer, x: mixer.train(trains)(x, mixer.site.grid).x)


@pytest.mark.parametrize("name", [name for name in CASES if "attn_mask" in reference.arrays(name)])
def test_scores_and_mask_equal_the_authors(name: str) -> None:
    mixer, x = loaded(name), reference.model_input(name)
    q, k, _, grid = mixer._heads(x, mixer.site.grid)
    assert reference.compare(name, "approx_attn", mixer.content(q, k, grid)) <= parity.OUTPUT
    assert reference.compare(name, "attn_mask", mixer.groups(x, grid).given["mask"].float()) == 0


@pytest.mark.parametrize("name", [name for name in CASES if "recon_loss" in reference.arrays(name)])
def test_the_loss_equals_the_authors(name: str) -> None:
    """They sum over images; its gradients reach queries, keys and predictor, and not values and output."""
    theirs = {key: value.requires_grad_() for key, value in reference.weights(name).items()}
    mixer, x = built(name), reference.model_input(name)
    mixed = torch.func.functional_call(mixer.train(), ours(theirs), (x, mixer.site.grid))
    loss = len(x) * mixed.losses["reconstruction"]
    assert reference.compare(name, "recon_loss", loss) <= parity.OUTPUT
    names = reference.info(name)["param_names"]
    grads = torch.autograd.grad(loss, [theirs[key] for key in names], allow_unused=True, materialize_grads=True)
    wanted = reference.arrays(name)["recon_loss_grad_norms"].tolist()
    assert [float(grad.norm()) for grad in grads] == pytest.approx(wanted, rel=parity.GRADIENT)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_all_keys_are_softmax_attention(prefix: int) -> None:
    grid = MAP._replace(prefix=prefix)
    all_of, softmax = (make(SITE._replace(grid=grid)) for make in (everything, softmax_attention))
    all_of.load_state_dict(softmax.state_dict(), strict=False)
    x = torch.randn(2, grid.tokens, 32)
    torch.testing.assert_close(all_of.eval()(x, grid).x, softmax(x, grid).x, rtol=0, atol=3e-7)


def everything(site: Site) -> Mixer:
    return sparsifiner_attention(site, keep=1.0)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("grid", [MAP, Grid(6, 9), Grid(5, 7, 1), Grid(12, 12, 1)])
def test_a_token_sees_its_share_and_a_class_token_all(keep: float, grid: Grid) -> None:
    """On the map that it is made for, and on others."""
    mixer = sparsifiner_attention(SITE._replace(grid=MAP._replace(prefix=grid.prefix)), keep=keep).eval()
    weights = mixer.attention_matrix(torch.randn(2, grid.tokens, 32), grid)
    seen_BMN = (weights > 0).sum(-1)
    assert (seen_BMN[..., : grid.prefix] == grid.tokens).all()
    assert (seen_BMN[..., grid.prefix :] == math.ceil(keep * grid.tokens)).all()


@pytest.mark.parametrize("phase", ["masked", "reconstruction"])
def test_the_predictor_learns_by_its_loss_alone(phase: str) -> None:
    mixer = sparsifiner_attention(SITE, phase=phase)
    mixed = mixer(torch.randn(2, MAP.tokens, 32), MAP)
    of_predictor = list(mixer.content.parameters())
    of_task = torch.autograd.grad(mixed.x.square().mean(), of_predictor, allow_unused=True, retain_graph=True)
    assert all(grad is None for grad in of_task)
    own = torch.autograd.grad(mixed.losses["reconstruction"], of_predictor)
    assert len(own) == 6 and all(grad.norm() > 0 for grad in own)


def test_in_the_first_phase_a_token_sees_all_while_it_is_trained() -> None:
    mixer, softmax = sparsifiner_attention(SITE, phase="reconstruction"), softmax_attention(SITE)
    mixer.load_state_dict(softmax.state_dict(), strict=False)
    x = torch.randn(2, MAP.tokens, 32)
    torch.testing.assert_close(mixer.train()(x, MAP).x, softmax(x, MAP).x)
    assert not mixer.eval()(x, MAP).losses and not torch.allclose(mixer(x, MAP).x, softmax(x, MAP).x, atol=1e-3)


def test_a_frozen_predictor_chooses_and_learns_nothing() -> None:
    """As in the second phase of the authors: only keys that it keeps, and no loss, while the rest is trained."""
    mixer, x = sparsifiner_attention(SITE), torch.randn(2, MAP.tokens, 32)
    expected = mixer.eval()(x, MAP).x
    mixer.train().content.eval()
    mixed = mixer(x, MAP)
    assert not mixed.losses
    torch.testing.assert_close(mixed.x, expected)


@pytest.mark.parametrize("data", ["digits", "deit_small"])
def test_the_phases_of_the_recipes_train_the_predictors_and_then_the_others(data: str) -> None:
    for phase, predicts in (("reconstruction", True), ("masked", False)):
        names = OmegaConf.load(CONF.parent / "recipes" / "sparsifiner" / f"{phase}_{data}.yaml").freeze
        model = create_model("vit_32px", "sparsifiner", depth=2, dim=32)
        Freezing(model, list(names))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        of_predictors = {name for name, _ in model.named_parameters() if ".content." in name}
        assert trained == of_predictors if predicts else not trained & of_predictors and len(trained) > 20


def test_the_predictor_learns_which_keys_have_weight() -> None:
    """Of keys that it keeps, the share of all weights rises with training by its loss alone."""
    torch.manual_seed(0)
    mixer = sparsifiner_attention(SITE, phase="reconstruction", reduce_tokens=2)
    torch.nn.init.normal_(mixer.qkv.weight, std=0.5)
    x = torch.randn(8, MAP.tokens, 32)
    optimizer = torch.optim.Adam(mixer.content.parameters(), 0.02)

    @torch.no_grad()
    def kept() -> float:
        q, k, _, grid = mixer._heads(x, MAP)
        seen = mixer.content.chosen(mixer.content(q, k, grid))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 1:]
        return float((weights * seen).sum(-1).mean())

    before = kept()
    for _ in range(60):
        optimizer.zero_grad()
        mixer(x, MAP).losses["reconstruction"].backward()
        optimizer.step()
    assert before < 0.35 and kept() > before + 0.1


def test_a_row_without_a_key_gives_zero() -> None:
    """As in the authors' code, whose nothing divided by nothing becomes 0."""
    mixer = sparsifiner_attention(SITE, keep=None, threshold=0.99)
    x = torch.randn(2, MAP.tokens, 32, requires_grad=True)
    mixed = mixer(x, MAP)
    bias = mixer.proj.bias.expand(2, MAP.cells, -1)
    torch.testing.assert_close(mixed.x[:, 1:], bias)
    assert not mixer.row_stochastic and not mixer.token_weights(x, MAP).weights[:, :, 1:].any()
    mixed.x.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad[:, :1].any()


@pytest.mark.parametrize("parts", [{}, {"bias": relative}, {"weights": sigmoid}], ids=["none", "bias", "weights"])
def test_weights_times_values_are_the_output(parts: dict[str, Any]) -> None:
    """With parts too; images and heads have masks of their own."""
    mixer = sparsifiner_attention(SITE, **parts)
    x = torch.randn(3, MAP.tokens, 32)
    trained = mixer(x, MAP).x
    output = mixer.eval()(x, MAP).x
    torch.testing.assert_close(trained, output)
    weights = mixer.attention_matrix(x, MAP)
    torch.testing.assert_close(mixer.attend(weights, x, MAP), output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer(x[1:2], MAP).x, output[1:2], rtol=1e-4, atol=1e-5)
    seen = weights > 0
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[:, 0], seen[:, 1])


def test_recomputed_it_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    mixer, x = sparsifiner_attention(SITE), torch.randn(2, MAP.tokens, 32)
    found = []
    for through in (mixer, lambda *given: recomputed(mixer, *given)):
        mixer.zero_grad()
        mixed = through(x, MAP)
        (mixed.x.square().mean() + mixed.losses["reconstruction"]).backward()
        found.append([parameter.grad.clone() for parameter in mixer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_on_another_map_scores_stay_estimates_of_weights() -> None:
    """Four times the tokens have a quarter of the score each, as of the weight."""
    mixer = sparsifiner_attention(SITE._replace(grid=Grid(6, 6))).eval()
    q, k = torch.randn(2, 1, 4, 36, 8).unbind(0)
    twice = [t.unflatten(2, (6, 6)).repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2, 3) for t in (q, k)]
    with torch.no_grad():
        for table in (mixer.content.proj_n.table, mixer.content.proj_back_n.table):
            table.copy_(table.mean(1, keepdim=True).expand_as(table))
    small, large = mixer.content(q, k, Grid(6, 6)), mixer.content(*twice, Grid(12, 12))
    torch.testing.assert_close(large[:, :, 0], small[:, :, 0].repeat_interleave(4, -1) / 4)
    assert reconstruction(small, q, k).detach() > 0


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsifiner: keys are chosen .* got keep=0.25 and threshold=0.1; set"):
        sparsifiner_attention(SITE, threshold=0.1)
    with pytest.raises(ValueError, match=r"got keep=None and threshold=None; set one of attention.keep and"):
        sparsifiner_attention(SITE, keep=None)
    with pytest.raises(ValueError, match=r"sparsifiner: keep must be a share above 0, at most 1, got 0; set"):
        sparsifiner_attention(SITE, keep=0)
    with pytest.raises(ValueError, match=r"threshold must be a number above 0 and below 1, got 2; set"):
        sparsifiner_attention(SITE, keep=None, threshold=2)
    with pytest.raises(ValueError, match=r"coefficients must be a whole number .* or null, got 1.5; set"):
        sparsifiner_attention(SITE, coefficients=1.5)
    with pytest.raises(ValueError, match=r"phase must be masked or reconstruction, got 'third'; set attention.phase"):
        sparsifiner_attention(SITE, phase="third")
    with pytest.raises(Refused, match=r"sparsifiner is a layout by itself; choose attention=softmax"):
        sparsifiner_attention(SITE, layout=lambda site: None)
    with pytest.raises(Refused, match=r"the scores of 55 x 55 pairs, more than max_tokens=50 allows; raise"):
        sparsifiner_attention(SITE, max_tokens=50)
    with pytest.raises(Refused, match=r"reduce_channels=9 leaves none of the 8 channels of a head .*; lower"):
        sparsifiner_attention(SITE, reduce_channels=9)
