"""SHViT: equal to timm's, in its names and the authors', folded or not; where it has mixers, and what is refused."""

from functools import partial

import pytest
import torch
from timm.models import shvit as timms
from torch import nn

from conf import families
from models import create_model
from models.attention import Grid
from models.attention.softmax import softmax_attention
from models.backbones.shvit import SHViT
from models.checkpoints import convert, export
from models.layers.batch_normed import LocalBlock
from models.layers.folded_norms import fold_norms
from tests.models.backbones import oracle

SMALL = {"dims": [32, 56, 72], "depths": [1, 2, 1], "num_heads": [1, 2, 2]}
small = partial(timms.SHViT, embed_dim=(32, 56, 72), depth=(1, 2, 1), partial_dim=(8, 12, 15), types=("i", "s", "s"))
COUNTS = {
    "shvit_s1": (6_330_808, 0.241),
    "shvit_s2": (11_483_072, 0.365),
    "shvit_s3": (14_245_273, 0.601),
    "shvit_s4": (16_588_484, 0.986),
}
make = partial(SHViT, image_size=32, num_classes=5, patch_size=4, **SMALL)


@pytest.mark.parametrize(
    ("size", "at"), [(128, None), pytest.param((96, 128), (160, 96), marks=pytest.mark.full)], ids=["square", "wide"]
)
def test_equals_timm(size, at):
    oracle.equal("shvit_s1", small(), size, at=at, **SMALL)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_adds(name):
    """timm's, at the pixels of the row."""
    counted, (parameters, billions) = families.models()[name]["counted"], COUNTS[name]
    assert counted["parameters"] == parameters
    assert counted["multiply_adds"] / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("size", ["s1", "s2", "s3", "s4"])
def test_every_size_has_timms_weights(size):
    with torch.device("meta"):
        state = getattr(timms, f"shvit_{size}")(num_classes=7).state_dict()
        ours = create_model(f"shvit_{size}", num_classes=7).state_dict()
    converted = convert(state, f"shvit_{size}", num_classes=7)
    assert {key: value.shape for key, value in converted.items()} == {key: v.shape for key, v in ours.items()}


def authors_names(state):
    """timm's names of weights as the authors': one row of modules per stage, the first three in front of the blocks."""
    found, entry = {}, ["0.0", "0.1", "1", "2.0", "2.1"]
    for key, value in state.items():
        match key.split("."):
            case ["stages", s, "downsample", part, *rest]:
                key = ".".join([f"blocks{int(s) + 1}", entry[int(part)], *rest])
            case ["stages", s, "blocks", b, *rest]:
                key = ".".join([f"blocks{int(s) + 1}", str(int(b) + (3 if s != "0" else 0)), *rest])
        found[key] = value
    return found


def test_files_of_the_authors_are_read_and_written():
    torch.manual_seed(0)
    theirs = oracle.filled(small(), (64, 64))
    state = authors_names(theirs.state_dict())
    assert "blocks3.1.se.fc1.weight" in state and "blocks2.4.mixer.m.proj.1.bn.running_var" in state
    ours = convert({"model": state}, "shvit_s1", **SMALL)
    model = create_model("shvit_s1", **SMALL).eval()
    model.load_state_dict(ours)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)
    back = export(ours, "shvit_s1", **SMALL)
    assert set(back) == set(state) and all(torch.equal(back[key], value) for key, value in state.items())


def test_folded_norms_change_nothing_in_evaluation():
    torch.manual_seed(0)
    theirs = oracle.filled(small(), (64, 64))
    model = create_model("shvit_s1", **SMALL).eval()
    model.load_state_dict(convert(theirs.state_dict(), "shvit_s1", **SMALL))
    model, images = model.double(), torch.randn(2, 3, 96, 64, dtype=torch.float64)
    before, norms = model(images), sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    assert fold_norms(model) == norms > 30
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match=r"fold_norms: the model must be in evaluation, got one in training; call mod"):
        fold_norms(make(softmax_attention).train())
    with pytest.raises(
        ValueError, match=r"fold_norms: a batch norm must stand behind a product, got none in Linear; l"
    ):
        fold_norms(nn.Linear(2, 2).eval())


def test_its_sites_and_blocks(recorder):
    model = make(recorder)
    assert [(site.stage, site.dim, site.grid, site.kind) for site in recorder.sites] == [
        (1, 56, Grid(4, 4), "hybrid"),
        (1, 56, Grid(4, 4), "hybrid"),
        (2, 72, Grid(2, 2), "hybrid"),
    ]
    assert [type(stage.blocks[0]) is LocalBlock for stage in model.stages] == [True, False, False]
    assert isinstance(model.stages[1].blocks[0].norm1, nn.LayerNorm)  # in front of mixers that have none
    own = create_model("shvit_32px")
    assert isinstance(own.stages[1].blocks[0].norm1, nn.Identity)


def test_a_block_starts_as_the_identity():
    block, x = create_model("shvit_32px").stages[1].blocks[0].train(), torch.randn(2, 64, 32)
    assert torch.equal(block(x, Grid(8, 8))[0], x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 6}, r"SHViT: patch_size must be a power of two from 2 on, got 6; set model.patch_size"),
        (
            {"dims": [30, 56, 72], "patch_size": 8},
            r"SHViT: dims must begin with a multiple of 4, .*, got 30; set model",
        ),
        ({"attention_stages": [3]}, r"SHViT: attention_stages must name at least one of the stages 0 to 2, got \[3\]"),
    ],
)
def test_wrong_settings_are_refused(recorder, settings, message):
    with pytest.raises(ValueError, match=message):
        make(recorder, **settings)


def test_keys_of_blocks():
    model = create_model("shvit_32px", activation="silu", norm="layernorm")
    assert {type(block.mlp.act) for stage in model.stages for block in stage.blocks} == {nn.SiLU}
    assert isinstance(model.head_norm, nn.LayerNorm)
    with pytest.raises(ValueError, match=r"SHViT: LocalBlock is no block of two branches .*, got wiring=parallel"):
        create_model("shvit_32px", wiring="parallel")
