"""Biases of places: the recorded cases of KERPLE, and what each depends on."""

import re

import parity
import pytest
import reference
import torch

from models.attention import Grid, Site
from models.attention.biases.alibi import alibi
from models.attention.biases.continuous import continuous
from models.attention.biases.kerple import kerple
from models.attention.biases.relative import relative
from models.attention.biases.rpb import rpb
from models.attention.contract.places import offsets

SITE = Site(dim=16, num_heads=2, grid=Grid(4, 5), stage=0, block=0, depth=2, kind="vit")
PARTS = {"alibi": alibi, "continuous": continuous, "kerple": kerple, "relative": relative, "rpb": rpb}


@pytest.mark.parametrize("name", [name for name in reference.cases("module") if name.startswith("kerple/")])
def test_kerple(name):
    """On a row of tokens; the authors' form is causal, with distance 0 to later tokens."""
    hparams = reference.info(name)["hparams"]
    kind = "log" if hparams["pos_emb"] == "kerple_log" else "power"
    site = SITE._replace(num_heads=hparams["num_attention_heads"])

    def scores(module, logits):
        grid = Grid(1, logits.shape[-1])
        return logits + module(grid, grid).tril()

    def state(theirs):
        return {name: theirs[f"bias_{name}"].flatten() for name in ("p", "a")}

    parity.check(name, kerple(site, kind=kind), state, scores)


@pytest.mark.parametrize("name", PARTS)
def test_it_depends_on_the_offset_alone_and_leaves_prefix_tokens_as_they_are(name):
    part, grid = PARTS[name](SITE), SITE.grid
    bias = part(grid, grid)
    assert bias.shape == (2, 20, 20)
    torch.testing.assert_close(bias[:, 0, 6], bias[:, 6, 12])
    torch.testing.assert_close(part.at(offsets(grid, grid, torch.device("cpu"))), bias)
    padded = part(grid._replace(prefix=2), grid._replace(prefix=1))
    assert padded.shape == (2, 22, 21) and not padded[:, :2].any() and not padded[:, :, :1].any()
    torch.testing.assert_close(padded[:, 2:, 1:], bias)
    assert part(Grid(8, 10), Grid(4, 5)).shape == (2, 80, 20)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple_falls_with_the_distance_and_is_the_same_on_every_map(kind, norm):
    part = kerple(SITE, kind=kind, norm=norm)
    assert sum(parameter.numel() for parameter in part.parameters()) == 4
    falls = part.at(torch.tensor([[0.0, 0], [0, 1], [1, 1], [2, 2], [3, 4]]))
    assert (falls.diff() < 0).all() and not falls[:, 0].any()
    small, large = part(Grid(1, 4), Grid(1, 4)), part(Grid(1, 9), Grid(1, 9))
    torch.testing.assert_close(large[:, :4, :4], small)
    torch.testing.assert_close(part.at(torch.tensor([1.0, 2])), part.at(torch.tensor([-2.0, 1])))


def test_kerple_of_parameters_below_their_least_value_still_has_a_gradient():
    part = kerple(SITE)
    torch.nn.init.constant_(part.a, -1.0)
    part(SITE.grid, SITE.grid).sum().backward()
    assert part.a.grad.all() and part.p.grad.all()


def test_rpb_is_the_mirror_image_of_the_relative_table():
    ours, swin = rpb(SITE), relative(SITE)
    with torch.no_grad():
        swin.table.copy_(ours.table.flip(1, 2).flatten(1).mT)
    torch.testing.assert_close(ours(SITE.grid, SITE.grid), swin(SITE.grid, SITE.grid))


def test_a_table_of_another_map_is_resized():
    small, large = rpb(SITE), rpb(SITE._replace(grid=Grid(7, 7)))
    assert small.resized("table", large.table).shape == small.table.shape


def test_alibi_has_fixed_slopes():
    part = alibi(SITE._replace(num_heads=8))
    torch.testing.assert_close(part.at(torch.tensor([3.0, 4.0])), -5 * 0.5 ** torch.arange(1.0, 9))
    assert not list(part.parameters()) and not part.state_dict()


@pytest.mark.parametrize(
    ("part", "given", "text"),
    [
        (kerple, {"kind": "linear"}, "kerple: kind must be log or power, got 'linear'; set attention.bias.kind"),
        (kerple, {"norm": 3}, "kerple: norm must be 1 or 2, got 3; set attention.bias.norm"),
        (
            continuous,
            {"hidden": 0},
            "continuous: hidden must be a whole number of at least 1, got 0; set attention.bias",
        ),
        (continuous, {"pretrain_size": 0}, "continuous: pretrain_size must be a whole number of at least 1, or two"),
    ],
)
def test_wrong_options_are_named(part, given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        part(SITE, **given)
