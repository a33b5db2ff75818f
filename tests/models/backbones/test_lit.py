"""LIT: the authors' results with their weights, sizes, files in their names, what its stages are made of."""

import parity
import pytest
import reference
import torch

from conf import families
from models import create_model
from models.attention import Grid
from models.backbones.lit import LIT
from models.checkpoints import convert, export
from models.layers.block import Block
from models.layers.deformable import DeformableDownsample
from models.layers.mlp_block import MlpBlock

CASES = [name for name in reference.cases("model") if name.startswith("lit/")]
PARAMETERS = {"small": 27_973_720, "medium": 49_372_264, "base": 87_292_384}  # of the authors' code
SHORT = {"dims": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 4], "num_classes": 5}


def settings(hparams: dict) -> dict:
    """Of a case, as our model takes them."""
    dims = [hparams["embed_dim"] << s for s in range(len(hparams["depths"]))]
    given = {key: hparams[key] for key in ("patch_size", "num_classes", "depths", "num_heads")}
    return given | {"dims": dims, "image_size": hparams["img_size"]}


def test_the_cases_are_found():
    assert CASES


@pytest.mark.parametrize("name", CASES)
def test_model(name):
    given = settings(reference.info(name)["hparams"])
    model = create_model("lit_small", **given)
    assert sum(p.numel() for p in model.parameters()) == reference.info(name)["num_params"]
    counters = {key: torch.tensor(0) for key in reference.info(name)["state"] if key.endswith("num_batches_tracked")}
    parity.check(name, model, lambda state: convert(state | counters, "lit_small", **given), lambda model, x: model(x))


@pytest.mark.parametrize("name", CASES)
def test_files_of_the_authors_have_exactly_these_names(name):
    given, wanted = settings(reference.info(name)["hparams"]), reference.info(name)["state"]
    torch.manual_seed(0)
    state = create_model("lit_small", **given).state_dict()
    file = export(state, "lit_small", **given)
    assert {key: [*value.shape] for key, value in file.items()} == {key: shape for key, (shape, _) in wanted.items()}
    back = convert({"model": file}, "lit_small", **given)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_and_multiply_adds(size):
    row = families.models()[f"lit_{size}"]
    assert row["counted"]["parameters"] == PARAMETERS[size]
    assert row["counted"]["multiply_adds"] / 1e9 == pytest.approx(row["published"]["multiply_adds"], rel=0.01)


def test_its_sites_are_those_of_the_stages_with_attention(recorder):
    model = LIT(recorder, (64, 96), 5, **{key: value for key, value in SHORT.items() if key != "num_classes"})
    found = [(site.dim, site.num_heads, site.grid, site.stage, site.block) for site in recorder.sites]
    deep, last = (64, 2, Grid(4, 6), 2), (128, 4, Grid(2, 3), 3)
    assert found == [(*deep, 0), (*deep, 1), (*last, 0)]
    assert [type(stage.blocks[0]) for stage in model.stages] == [MlpBlock, MlpBlock, Block, Block]
    assert all(type(stage.downsample) is DeformableDownsample for stage in model.stages[1:])


def test_a_patch_of_the_first_stages_alone_reads_its_pixels(recorder):
    """MLPs mix no tokens: before the map is halved no patch knows of another."""
    torch.manual_seed(0)
    model = create_model("lit_small", image_size=64, **SHORT).eval()
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[..., 4:] = 0
    first, second = (model.stages[0](*model.stem(given))[0] for given in (images, changed))
    assert torch.equal(first[:, ::16], second[:, ::16]) and not torch.allclose(first[:, 1], second[:, 1])


def test_keys_of_its_blocks():
    """Other norms and activations go into the MLPs too; nothing is left to be wired in parallel."""
    model = create_model("lit_32px", norm="rmsnorm", activation="relu", num_classes=5)
    block = model.stages[0].blocks[0]
    assert type(block.norm2) is torch.nn.RMSNorm and type(block.mlp.act) is torch.nn.ReLU
    create_model("lit_32px", downsample="deformable", num_classes=5)
    with pytest.raises(ValueError, match=r"LIT: MlpBlock is no block of two branches .*; set model.wiring=sequential"):
        create_model("lit_32px", wiring="parallel")


def test_stages_that_are_none_are_refused(recorder):
    with pytest.raises(
        ValueError, match=r"LIT: attention_stages must name .* 0 to 3, got \[4\]; set model.attention_st"
    ):
        create_model("lit_small", attention_stages=[4])
