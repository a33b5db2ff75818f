"""Flowformer: its block as the authors', files in their names, its size, sites, position table and scales."""

import parity
import pytest
import reference
import torch
from torch import nn

from models import create_model
from models.attention import Grid
from models.attention.cores.flow import flow_attention
from models.backbones.flowformer import Flowformer
from models.checkpoints import convert, export
from models.checkpoints.names.flowformer import LAYOUTS

NAME = "flowformer_cv"
SHORT = {"dims": [12, 24, 36, 48], "depths": [1, 1, 2, 1], "num_heads": [3, 3, 3, 3], "num_classes": 5}
BLOCKS = [
    n for n in reference.cases("module") if n.startswith("flowformer/") and "norm2.weight" in reference.info(n)["state"]
]


def of(attention, image_size=32, dims=(16, 32), **settings) -> Flowformer:
    sizes = {"depths": [1] * len(dims), "num_heads": [4] * len(dims), "layer_scale": 1e-5} | settings
    return Flowformer(attention, image_size, 5, dims=list(dims), **sizes)


def test_the_cases_are_found() -> None:
    assert BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_equals_the_authors(name: str) -> None:
    """With 12 heads."""
    case = reference.info(name)
    side = int(case["input_shape"][1] ** 0.5)
    hparams = {"mlp_ratio": 4.0} | {key: value for key, value in case["hparams"].items() if key == "mlp_ratio"}
    block = of(flow_attention, 4 * side, (case["hparams"]["dim"],), num_heads=[12], **hparams).stages[0].blocks[0]
    take = parity.through(LAYOUTS[0], block, "stages.0.blocks.0.", "blocks.0.0.")
    parity.check(name, block, take, lambda m, x: m(x, Grid(side, side))[0])


def test_files_of_the_authors_have_exactly_these_names() -> None:
    """43,311,304 numbers."""
    wanted = reference.info(f"flowformer/{NAME}")["state"]
    with torch.device("meta"):
        state = create_model(NAME).state_dict()
    file = export(state, NAME)
    assert {key: [*value.shape] for key, value in file.items()} == {key: shape for key, (shape, _) in wanted.items()}
    assert sum(value.numel() for value in file.values()) == 43_311_304


def test_a_round_trip_gives_the_same_bits_and_counters_of_a_profiler_are_left_out() -> None:
    state = create_model(NAME, image_size=64, **SHORT).state_dict()
    file = export(state, NAME, image_size=64, **SHORT)
    counters = {
        f"{place}total_{what}": torch.zeros(1) for place in ("", "blocks.0.0.attn.") for what in ("ops", "params")
    }
    back = convert({"model": file | counters}, NAME, image_size=64, **SHORT)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_the_table_of_a_file_is_made_to_fit() -> None:
    """At run time too: both are the same function."""
    settings = SHORT | {"depths": [1, 1, 1, 1]}
    torch.manual_seed(0)
    model = create_model(NAME, image_size=64, **settings).eval()
    with pytest.warns(UserWarning, match="image size"):
        larger = convert(export(model.state_dict(), NAME, image_size=64, **settings), NAME, image_size=96, **settings)
    assert larger["stem.start.position.table"].shape == (1, 576, 12)
    images, other = torch.randn(1, 3, 96, 96), create_model(NAME, image_size=96, **settings).eval()
    other.load_state_dict(larger)
    torch.testing.assert_close(other(images), model(images))


def test_its_sites_and_odd_maps(recorder) -> None:
    model = of(recorder, (36, 28))
    found = [(site.dim, site.num_heads, site.grid, site.kind) for site in recorder.sites]
    assert found == [(16, 4, Grid(9, 7), "hierarchical"), (32, 4, Grid(5, 4), "hierarchical")]
    maps = model.forward_pyramid(torch.randn(2, 3, 36, 28))
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 7), (5, 4)]


def test_scales_stand_on_the_mlps_alone() -> None:
    blocks = [block for stage in create_model("flowformer_32px").stages for block in stage.blocks]
    assert all(torch.equal(block.scale2.gamma, torch.full_like(block.scale2.gamma, 1e-5)) for block in blocks)
    assert all(isinstance(block.scale1, nn.Identity) for block in blocks)
    plain = create_model("flowformer_32px", layer_scale=None)
    assert not any("gamma" in key for key in plain.state_dict())


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dim 16 .*num_heads|num_heads .*16|divi"):
        of(flow_attention, num_heads=[3, 4])
