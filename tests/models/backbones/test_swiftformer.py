"""SwiftFormer: equal to timm's, in its names and the authors', its two heads, and where it has mixers."""

from functools import partial

import pytest
import torch
from timm.models import swiftformer as timms
from torch import nn

from conf import families
from models import create_model
from models.attention import Grid
from models.attention.softmax import softmax_attention
from models.backbones.swiftformer import SwiftFormer
from models.checkpoints import convert, export
from models.layers.conv_encoder import EncoderBlock
from models.layers.folded_norms import fold_norms
from tests.models.backbones import oracle

SMALL = {"dims": [16, 24, 32, 40], "depths": [1, 2, 2, 1], "num_heads": [2, 2, 4, 4]}
small = partial(timms.SwiftFormer, layers=SMALL["depths"], embed_dims=SMALL["dims"])
COUNTS = {
    "swiftformer_xs": (3_475_360, 0.602),
    "swiftformer_s": (6_092_128, 0.985),
    "swiftformer_l1": (12_057_920, 1.596),
    "swiftformer_l3": (28_494_736, 4.008),
}
make = partial(SwiftFormer, image_size=32, num_classes=5, dims=[16, 32], depths=[2, 3], num_heads=[2, 4])


@pytest.mark.parametrize(
    ("size", "at"), [(64, (96, 64)), pytest.param((96, 128), (65, 95), marks=pytest.mark.full)], ids=["even", "odd"]
)
def test_equals_timm(size, at):
    """Of an odd image ours completes the map, which for these convolutions is what their own padding does."""
    oracle.equal("swiftformer_xs", small(), size, at=at, **SMALL)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_adds(name):
    """timm's, at the pixels of the row."""
    counted, (parameters, billions) = families.models()[name]["counted"], COUNTS[name]
    assert counted["parameters"] == parameters
    assert counted["multiply_adds"] / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("size", ["xs", "s", "l1", "l3"])
def test_every_size_has_timms_weights(size):
    with torch.device("meta"):
        state = getattr(timms, f"swiftformer_{size}")(num_classes=7).state_dict()
        ours = create_model(f"swiftformer_{size}", num_classes=7).state_dict()
    converted = convert(state, f"swiftformer_{size}", num_classes=7)
    assert {key: value.shape for key, value in converted.items()} == {key: v.shape for key, v in ours.items()}


def test_files_of_the_authors_are_read_as_timm_reads_them():
    """timm renames the authors' weights when it loads them: what we write in their names is the same model there."""
    model, theirs = create_model("swiftformer_xs", num_classes=5, **SMALL).eval(), small(num_classes=5).eval()
    state = model.state_dict()
    file = export(state, "swiftformer_xs", **SMALL)
    of_theirs = {"patch_embed.3.weight", "network.1.proj.bias", "network.4.1.attn.Proj.weight", "dist_head.weight"}
    assert of_theirs <= set(file) and file["network.0.0.layer_scale_1"].shape == (16, 1, 1)
    back = convert({"model": file}, "swiftformer_xs", **SMALL)
    assert all(torch.equal(back[key], value) for key, value in state.items()) and set(back) == set(state)
    theirs.load_state_dict(timms.checkpoint_filter_fn({"model": file}, theirs))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_heads_must_agree_about_the_classes():
    file = export(create_model("swiftformer_xs", num_classes=5, **SMALL).state_dict(), "swiftformer_xs", **SMALL)
    assert convert(file, "swiftformer_xs", num_classes=5, **SMALL)["distill_head.bias"].shape == (5,)
    with pytest.raises(ValueError, match=r"convert: the file must have 7 classes, got 5; fine-tune it, or evaluate"):
        convert(file, "swiftformer_xs", num_classes=7, **SMALL)
    with pytest.raises(ValueError, match=r"convert: the parts of the head must have one number of classes, got"):
        convert(
            file | {"dist_head.weight": torch.zeros(7, 40), "dist_head.bias": torch.zeros(7)}, "swiftformer_xs", **SMALL
        )


def test_the_logits_are_the_mean_of_two_heads():
    model, images = make(softmax_attention).eval(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(images).mean(1)
    expected = (model.head(features) + model.distill_head(features)) / 2
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model(images, return_losses=True)[0], expected)
    assert make(softmax_attention, num_classes=0).distill_head is None


@pytest.mark.parametrize("chosen", [{"head": "tversky"}, {"pool": "efficient_probing"}], ids=["head", "pool"])
def test_another_head_or_pool_has_no_second_one(chosen):
    model = create_model("swiftformer_32px", num_classes=5, **chosen)
    replaced = not isinstance(model.head, nn.Linear) or model.head.in_features != 64
    assert (model.distill_head is None) == replaced
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_its_sites_and_blocks(recorder):
    model = make(recorder)
    assert [(site.stage, site.block, site.depth, site.grid, site.kind) for site in recorder.sites] == [
        (0, 1, 2, Grid(8, 8), "hybrid"),
        (1, 2, 3, Grid(4, 4), "hybrid"),
    ]
    assert [[type(block) is EncoderBlock for block in stage.blocks] for stage in model.stages] == [
        [True, False],
        [True, True, False],
    ]
    assert isinstance(model.stages[0].blocks[1].norm1, nn.LayerNorm)  # in front of mixers that have none
    assert isinstance(create_model("swiftformer_32px").stages[0].blocks[1].norm1, nn.Identity)


def test_the_scales_start_at_one_and_at_a_hundred_thousandth():
    model = create_model("swiftformer_xs", **SMALL)
    scales = {name: p for name, p in model.named_parameters() if name.endswith(("scale", "gamma"))}
    assert {name.rpartition(".")[2]: p.unique().item() for name, p in scales.items()} == {
        "scale": 1.0,
        "gamma": pytest.approx(1e-5),
    }


def test_folded_norms_change_nothing_in_evaluation():
    torch.manual_seed(0)
    theirs = oracle.filled(small(), (64, 64))
    model = create_model("swiftformer_xs", **SMALL).eval()
    model.load_state_dict(convert(theirs.state_dict(), "swiftformer_xs", **SMALL))
    model, images = model.double(), torch.randn(2, 3, 96, 64, dtype=torch.float64)
    before = model(images)
    assert fold_norms(model) == 2 + 3 + 6  # in the stem, between stages, in blocks; those in front of products stay
    torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-9)


def test_keys_of_blocks():
    model = create_model("swiftformer_32px", activation="silu")
    assert {type(m.mlp.act) for m in model.modules() if hasattr(m, "mlp")} == {nn.SiLU}
    with pytest.raises(
        ValueError, match=r"SwiftFormer: ConvEncoder is no block of two branches .*, got wiring=parallel"
    ):
        create_model("swiftformer_32px", wiring="parallel")
