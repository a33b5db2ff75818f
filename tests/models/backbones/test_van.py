"""VAN: its block and patches as the authors', files in their names, its sites, how its weights start."""

import parity
import pytest
import reference
import torch

from conf import families
from models import create_model
from models.attention import Grid
from models.attention.large_kernel import LargeKernelAttention
from models.backbones.van import VAN
from models.checkpoints import convert, export
from models.checkpoints.names.van import LAYOUTS

ROWS = {name: row for name, row in families.models().items() if row["family"] == "van" and row["size"] != "32px"}
GIGA = {"b0": 0.864, "b1": 2.495, "b2": 4.993, "b3": 8.925}  # of the authors' code at 224 pixels
MILLIONS = {  # parameters of the authors' code; that of b6 is rounded
    "b0": 4.105800, "b1": 13.861800, "b2": 26.578472, "b3": 44.765608, "b4": 60.283176, "b5": 89.967688, "b6": 200,
}  # fmt: skip
SHORT = {"dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4], "num_classes": 5}


def cases(constructor: str) -> list[str]:
    return [n for n in reference.cases("module") if reference.info(n).get("official_constructor") == constructor]


def one_stage(dim: int, mlp_ratio: float, grid: tuple[int, int]) -> VAN:
    """A stage of a block, for maps of a size."""
    sides = [4 * side for side in grid[:2]]
    return VAN(
        LargeKernelAttention, sides, 5, dims=[dim], depths=[1], num_heads=[1], mlp_ratios=[mlp_ratio], layer_scale=1.0
    )


def checked(name: str, module: torch.nn.Module, ours: str, theirs: str, call) -> None:
    """`parity.check`; the cases leave the counters of batch norms as they were made."""
    counters = {key: torch.tensor(0) for key in reference.info(name)["state"] if key.endswith("num_batches_tracked")}
    take = parity.through(LAYOUTS[0], module, ours, theirs)
    parity.check(name, module, lambda state: take(state | counters), call)


def test_the_cases_are_found():
    assert cases("van.Block") and cases("van.OverlapPatchEmbed")


@pytest.mark.parametrize("name", cases("van.Block"))
def test_the_block_equals_the_authors(name):
    case = reference.info(name)
    grid = Grid(*case["input_shape"][2:])
    block = one_stage(case["hparams"]["dim"], case["hparams"].get("mlp_ratio", 4.0), grid).stages[0].blocks[0]

    def call(block, x):
        return block(x.flatten(2).mT, grid)[0].mT.unflatten(2, grid[:2])

    checked(name, block, "stages.0.blocks.0.", "block1.0.", call)


@pytest.mark.parametrize("name", cases("van.OverlapPatchEmbed"))
def test_patches_equal_the_authors(name):
    """Those in front with stride 4, those between two stages with stride 2."""
    case = reference.info(name)
    hparams, shape = case["hparams"], case["input_shape"]
    if hparams["stride"] == 4:
        stem = one_stage(hparams["embed_dim"], 4, (9, 8)).stem

        def call(stem, images):
            x, grid = stem(images)
            return x.mT.unflatten(2, grid[:2])

        checked(name, stem, "stem.", "patch_embed1.", call)
        return
    dims = [shape[1], hparams["embed_dim"]]
    model = VAN(LargeKernelAttention, 32, 5, dims=dims, depths=[1, 1], num_heads=[1, 1], mlp_ratios=[4, 4])

    def smaller(between, x):
        x, grid = between(x.flatten(2).mT, Grid(*x.shape[2:]))
        return x.mT.unflatten(2, grid[:2])

    checked(name, model.stages[1].downsample, "stages.1.downsample.", "patch_embed2.", smaller)


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_multiply_adds(name):
    size, counted = ROWS[name]["size"], ROWS[name]["counted"]
    assert counted["parameters"] / 1e6 == pytest.approx(MILLIONS[size], rel=1e-3 if size == "b6" else 1e-12)
    if size in GIGA:
        assert counted["multiply_adds"] / 1e9 == pytest.approx(GIGA[size], rel=0.01)


@pytest.mark.parametrize("name", ["van/van_b0", pytest.param("van/van_b1", marks=pytest.mark.full)])
def test_files_of_the_authors_have_exactly_these_names(name):
    model, wanted = name.partition("/")[2], reference.info(name)["state"]
    with torch.device("meta"):
        state = create_model(model).state_dict()
    file = export(state, model)
    assert {key: [*value.shape] for key, value in file.items()} == {key: shape for key, (shape, _) in wanted.items()}
    back = convert({"state_dict": file}, model, num_classes=1000)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}


def test_a_round_trip_gives_the_same_bits():
    torch.manual_seed(0)
    state = create_model("van_b0", **SHORT).state_dict()
    back = convert(export(state, "van_b0", **SHORT), "van_b0", **SHORT)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_its_sites(recorder):
    VAN(recorder, (32, 24), 5, dims=[16, 32], depths=[1, 1], num_heads=[2, 4], mlp_ratios=[4, 4])
    found = [(site.dim, site.num_heads, site.grid, site.kind) for site in recorder.sites]
    assert found == [(16, 2, Grid(8, 6), "hierarchical"), (32, 4, Grid(4, 3), "hierarchical")]


def test_products_start_as_the_1x1_convolutions_of_the_authors():
    """With variance 2 / outputs; those of a mechanism that does not say so start as everywhere."""
    torch.manual_seed(0)
    block = create_model("van_b0").stages[3].blocks[0]
    for linear in (block.attn.proj_in, block.attn.mix, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        assert linear.weight.std().item() == pytest.approx((2 / linear.out_features) ** 0.5, rel=0.02)
        assert not linear.bias.any()
    assert block.attn.dilated.weight.std().item() == pytest.approx((2 / 49) ** 0.5, rel=0.05)
    softmax = create_model("van_b0", "softmax").stages[3].blocks[0].attn
    assert softmax.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_other_norms_for_all_of_its_blocks():
    model = create_model("van_32px", norm="layernorm", num_classes=5)
    assert not any("bn" in name for name in model.stages[0].blocks.state_dict())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
