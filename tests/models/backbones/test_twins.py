"""Twins: equal to timm's with the same weights; the sizes of the paper; where the position stands."""

from functools import partial

import pytest
import timm
import torch
from timm.models.twins import Twins as Theirs

from conf import families
from models import create_model
from models.attention import Grid
from models.attention.layouts.twins import twins
from models.attention.softmax import softmax_attention
from models.backbones.twins import Twins
from models.checkpoints import convert, export
from tests.models.backbones import oracle

ROWS = {name: row for name, row in families.models().items() if row["family"] == "twins" and row["size"] != "32px"}
GIGA = {  # multiply-adds of timm's models at 224 pixels, products and convolutions
    "svt_small": 2.927, "svt_base": 8.563, "svt_large": 15.112,
    "pcpvt_small": 3.809, "pcpvt_base": 6.653, "pcpvt_large": 9.808,
}  # fmt: skip
SHORT = {"dims": [8, 16, 24, 32], "depths": [2, 3, 2, 2], "num_heads": [1, 2, 3, 4], "mlp_ratios": [4, 2, 2, 2]}
QUICK = "twins_svt_small"
attention = partial(softmax_attention, layout=twins)
small = partial(Twins, attention, 32, 5, dims=[8, 16], depths=[3, 2], num_heads=[1, 2], mlp_ratios=[2, 2])


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def short(name: str, **other: object) -> Theirs:
    given = SHORT | other
    shape = {"embed_dims": given["dims"], "mlp_ratios": given["mlp_ratios"]}
    windows = {"wss": (7, 7, 7, 7)} if "svt" in name else {}
    return Theirs(depths=given["depths"], num_heads=given["num_heads"], **shape, **windows)


@pytest.mark.parametrize(
    ("name", "size", "at"),
    [
        ("twins_svt_small", 64, (128, 96)),
        ("twins_pcpvt_small", 64, None),
        pytest.param("twins_svt_small", 224, None, marks=pytest.mark.full),
        pytest.param("twins_svt_small", 224, (224, 288), marks=pytest.mark.full),
        pytest.param("twins_pcpvt_small", 224, (160, 160), marks=pytest.mark.full),
    ],
)
def test_equals_timm(name, size, at):
    """Maps that windows do not fill are padded in both, whole ones at 224 pixels."""
    oracle.equal(name, short(name), size, at=at, **SHORT)


def test_the_position_behind_an_only_block():
    """A stage of one block ends with it."""
    depths = {"depths": [1, 2, 1, 1]}
    oracle.equal("twins_svt_small", short("twins_svt_small", **depths), 64, **(SHORT | depths))
    model = small(depths=[1, 2])
    assert model.stages[0].position is not None and model.stages[1].position is None
    assert [block.position is not None for block in model.stages[1].blocks] == [False, True]


@pytest.mark.parametrize("name", ROWS)
def test_multiply_adds(name):
    assert ROWS[name]["counted"]["multiply_adds"] / 1e9 == pytest.approx(GIGA[ROWS[name]["size"]], rel=0.01)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == QUICK else pytest.mark.full) for n in ROWS])
def test_the_whole_size_has_timms_names_and_parameters(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
        ours = create_model(name)
    learned = sum(parameter.numel() for parameter in theirs.parameters())
    assert ROWS[name]["counted"]["parameters"] == learned
    converted = convert(theirs.state_dict(), name, num_classes=1000)
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in ours.state_dict().items()}


@pytest.mark.parametrize("name", ["twins_svt_base", "twins_pcpvt_base"])
def test_names_both_ways(name):
    """Queries are apart from keys and values where these come from a shortened map."""
    ours = create_model(name, num_classes=5, **SHORT).state_dict()
    theirs = export(ours, name, **SHORT)
    assert ("blocks.2.0.attn.q.weight" in theirs) == ("pcpvt" in name) and "blocks.3.1.attn.kv.bias" in theirs
    assert {"pos_block.3.proj.0.weight", "patch_embeds.0.norm.bias", "blocks.0.1.attn.sr.weight"} <= set(theirs)
    back = convert(theirs, name, **SHORT)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], value) for key, value in ours.items())


def test_sites(recorder):
    Twins(recorder, (40, 64), 5, dims=[8, 16], depths=[1, 2], num_heads=[1, 2], mlp_ratios=[2, 2])
    assert [(site.grid, site.block, site.positioned, site.kind) for site in recorder.sites] == [
        (Grid(10, 16), 0, True, "hierarchical"),
        (Grid(5, 8), 0, True, "hierarchical"),
        (Grid(5, 8), 1, True, "hierarchical"),
    ]


@pytest.mark.parametrize("depths", [[3, 2], [1, 1]])
def test_positions_do_not_decay(depths):
    model = small(depths=depths)
    kept = model.no_weight_decay()
    assert len(kept) == 2 and all(name.endswith("position.proj.weight") for name in kept)


def test_windows_are_not_cut_to_the_map():
    model = small()
    assert [block.attn.window for stage in model.stages for block in stage.blocks] == [
        (7, 7),
        None,
        (7, 7),
        (7, 7),
        None,
    ]


def test_any_map_runs_where_timm_drops_the_rest():
    """36 × 44 pixels: 9 × 11 cells, of which a ratio of 8 leaves one uncovered row and three columns."""
    model, x = small().eval(), images(36, 44)
    changed = x.clone()
    changed[..., -1, -1] += 5
    assert model(x).shape == (2, 5) and not torch.allclose(model(x), model(changed), atol=1e-6)


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"Twins: .*differ in length, got .*'mlp_ratios': 3.*; give as many of each"):
        small(mlp_ratios=[4, 4, 4])
