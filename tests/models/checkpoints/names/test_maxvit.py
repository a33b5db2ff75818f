"""MaxViT in timm's files: names and shapes of every size both ways, tables that are flipped, other image sizes."""

import warnings

import pytest
import timm
import torch

from models import create_model
from models.checkpoints import convert, export
from models.checkpoints.names.layout import Axes

SIZES = ["tiny", *(pytest.param(size, marks=pytest.mark.full) for size in ("small", "base", "large", "xlarge"))]
SHORT = {"dims": [32, 32], "depths": [1, 1], "num_classes": 5}
TABLE = "stages.0.blocks.1.attn.core.bias.table"
THEIRS = "stages.0.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table"


@pytest.mark.parametrize("size", SIZES)
def test_timm_s_names_and_shapes_map_completely_and_back(size):
    with torch.device("meta"):
        theirs = timm.create_model(f"maxvit_{size}_tf_224", num_classes=1000).state_dict()
        model = create_model(f"maxvit_{size}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = convert(theirs, f"maxvit_{size}", num_classes=1000)
    model.load_state_dict(ours, assign=True)
    back = export(ours, f"maxvit_{size}")
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in theirs.items()}


def test_a_round_trip_gives_the_same_bits():
    torch.manual_seed(0)
    state = create_model("maxvit_tiny", image_size=64, **SHORT).state_dict()
    theirs = export(state, "maxvit_tiny", image_size=64, **SHORT)
    back = convert(theirs, "maxvit_tiny", image_size=64, **SHORT)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    # theirs by key less query: the offset (-1, 0) is that of ours by query less key (1, 0)
    assert theirs[THEIRS].shape == (1, 3, 3)
    assert theirs[THEIRS][0, 0, 1] == state[TABLE][2 * 3 + 1, 0]


def test_tables_of_another_image_size_are_resized():
    torch.manual_seed(0)
    state = create_model("maxvit_tiny", image_size=224, **SHORT).state_dict()
    theirs = export(state, "maxvit_tiny", **SHORT)
    with pytest.warns(UserWarning, match=r"resized: 'stages.0.blocks.0.attn.core.bias.table' and 3 more"):
        larger = convert(theirs, "maxvit_tiny", image_size=(384, 512), **SHORT)
    model = create_model("maxvit_tiny", image_size=(384, 512), **SHORT)
    model.load_state_dict(larger)
    assert larger[TABLE].shape == (23 * 31, 1)


def test_windows_that_are_no_squares_have_no_names_but_ours():
    state = create_model("maxvit_tiny", image_size=(64, 96), **SHORT).state_dict()
    with pytest.raises(
        ValueError,
        match=r"export: two axes of theirs that are one here must be equally long, got 15 numbers, no square; choose",
    ):
        export(state, "maxvit_tiny", image_size=(64, 96), **SHORT)


def test_axes_are_joined_and_flipped_and_parted_again():
    axes = Axes("", "1mhw", "(hw)m", "w")
    theirs = torch.arange(2 * 3 * 3).view(1, 2, 3, 3)
    ours = axes.take(theirs)
    assert ours.shape == (9, 2) and ours[1 * 3 + 0, 1] == theirs[0, 1, 1, 2]
    assert torch.equal(axes.give(ours), theirs)
    assert torch.equal(axes.take(theirs[0]), theirs[0])
