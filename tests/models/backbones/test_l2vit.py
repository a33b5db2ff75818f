"""L2ViT: its parts as the authors', files in their names, its sizes, who sees whom in which block."""

import parity
import pytest
import reference
import torch
from torch import Tensor, nn

from conf import families
from models import create_model
from models.attention import Grid
from models.attention.cores.linear import LinearCore
from models.backbones.l2vit import L2ViT
from models.checkpoints import convert, export
from models.checkpoints.names.l2vit import LAYOUTS
from models.layers.local_patch import LocalPatchInteraction
from models.layers.position import ConvPosition

ROWS = {name: row for name, row in families.models().items() if row["family"] == "l2vit" and row["size"] != "32px"}
MEASURED = {  # parameters, and 1e9 multiply-adds, of the authors' code; the latter of l2vit_base are the README's
    "l2vit_tiny": (28_596_781, 4.688), "l2vit_small": (50_199_157, 8.980), "l2vit_base": (88_577_188, 15.9),
    "l2vit_base_384": (88_577_188, 47.32),
}  # fmt: skip
SHORT = {"dims": [16, 32, 48, 64], "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4], "num_classes": 5}


def cases(part: str) -> list[str]:
    return [n for n in reference.cases("module") if n.startswith(f"l2vit/{part}")]


def checked(name: str, module: nn.Module, ours: str, theirs: str, call) -> None:
    """`parity.check`; the cases leave the counters of batch norms as they were made."""
    counters = {key: torch.tensor(0) for key in reference.info(name)["state"] if key.endswith("num_batches_tracked")}
    take = parity.through(LAYOUTS[0], module, ours, theirs)
    parity.check(name, module, lambda state: take(state | counters), call)


def test_the_cases_are_found() -> None:
    assert all(cases(part) for part in ("lga_block", "lwa_block", "patch_embed", "window_attention"))


@pytest.mark.parametrize("name", [*cases("lwa_block"), *cases("lga_block")])
def test_a_block_equals_the_authors(name: str) -> None:
    """Window blocks on maps that windows do not divide, and linear ones."""
    case, index = reference.info(name), int("lga" in name)
    height, width, dim = case["input_shape"][1:]
    given = {"num_heads": [case["hparams"]["num_heads"]], "mlp_ratio": case["hparams"].get("mlp_ratio", 4.0)}
    plan = {"layout": {"size": case["hparams"]["window_size"]}} if "window_size" in case["hparams"] else {}
    settings = {"image_size": (4 * height, 4 * width), "dims": [dim], "depths": [2]} | given
    model = create_model("l2vit_tiny", **settings, **({"even": plan} if plan else {}))

    def call(block: nn.Module, x: Tensor) -> Tensor:
        return block(x.flatten(1, 2), Grid(height, width))[0]

    checked(name, model.stages[0].blocks[index], f"stages.0.blocks.{index}.", f"stages.0.{index}.", call)


@pytest.mark.parametrize("name", cases("patch_embed"))
def test_the_stem_equals_the_authors(name: str) -> None:
    """In whole patches."""
    dim = reference.info(name)["hparams"]["embed_dim"]
    stem = create_model("l2vit_tiny", dims=[dim], depths=[1], num_heads=[1]).stem
    checked(name, stem, "stem.", "downsample_layers.0.", lambda stem, images: stem(images)[0])


@pytest.mark.parametrize("name", cases("window_attention"))
def test_attention_in_a_window_equals_the_authors(name: str) -> None:
    h, sides = reference.info(name)["hparams"], reference.info(name)["hparams"]["window_size"]
    size = [4 * side for side in sides]
    model = create_model("l2vit_tiny", image_size=size, dims=[h["dim"]], depths=[1], num_heads=[h["num_heads"]])
    checked(
        name,
        model.stages[0].blocks[0].attn,
        "stages.0.blocks.0.attn.",
        "stages.0.0.attn.",
        lambda m, x: m(x, Grid(*sides)).x,
    )


@pytest.mark.parametrize("name", ROWS)
def test_sizes(name: str) -> None:
    counted, (parameters, giga) = ROWS[name]["counted"], MEASURED[name]
    assert counted["parameters"] == parameters
    assert counted["multiply_adds"] / 1e9 == pytest.approx(giga, rel=0.01)


def test_files_of_the_authors_have_exactly_these_names() -> None:
    wanted = reference.info("l2vit/l2vit_tiny")["state"]
    with torch.device("meta"):
        file = export(create_model("l2vit_tiny").state_dict(), "l2vit_tiny")
    assert {key: [*value.shape] for key, value in file.items()} == {key: shape for key, (shape, _) in wanted.items()}


def test_a_round_trip_gives_the_same_bits() -> None:
    state = create_model("l2vit_small", image_size=64, **SHORT).state_dict()
    back = convert(export(state, "l2vit_small", image_size=64, **SHORT), "l2vit_small", image_size=64, **SHORT)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize(("name", "side"), [("l2vit_tiny", 7), ("l2vit_base_384", 12)])
def test_windows_and_linear_attention_take_turns(name: str, side: int) -> None:
    """Windows keep their side on smaller maps, which are padded."""
    blocks = [block for stage in create_model(name, image_size=64, **SHORT).stages for block in stage.blocks]
    for block in blocks[::2]:
        assert block.attn.layout.window == (side, side) and isinstance(block.mlp_position, ConvPosition)
    for block in blocks[1::2]:
        assert isinstance(block.attn.core, LinearCore) and block.attn.core.denominator_min == 100
        assert isinstance(block.mlp_position, LocalPatchInteraction)


def test_its_sites_and_odd_maps(recorder) -> None:
    model = L2ViT(recorder, (36, 26), 5, dims=[16, 32], depths=[1, 2], num_heads=[2, 4])
    found = [(site.dim, site.num_heads, site.grid, site.kind) for site in recorder.sites]
    assert found == [(16, 2, Grid(9, 7), "hierarchical"), *[(32, 4, Grid(5, 4), "hierarchical")] * 2]
    maps = model.forward_pyramid(torch.randn(2, 3, 36, 26))
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 7), (5, 4)]


def test_another_patch_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"L2ViT: patch_size must be 4, got 8; leave it out"):
        create_model("l2vit_32px", patch_size=8)
