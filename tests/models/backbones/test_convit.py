"""ConViT: timm's results with its weights, sizes, where the class token joins, any map, how its values start."""

import pytest
import timm
import torch

from conf import families
from models import create_model
from models.attention import Grid
from models.backbones.convit import ConViT
from models.initializers.gpsa import gpsa
from tests.models.backbones import oracle

# parameters of timm's models; heads; billions of multiply-adds as PyTorch counts timm's; channels
SIZES = {
    "convit_tiny": (5_710_512, 4, 1.252, 192),
    "convit_small": (27_777_322, 9, 5.747, 432),
    "convit_base": (86_540_040, 16, 17.505, 768),
}
small = {"patch_size": 8, "dim": 16, "num_heads": 2}


def narrow(size, dim=32, heads=4):
    return timm.create_model("convit_tiny", embed_dim=dim // heads, num_heads=heads, img_size=size)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds(name):
    """timm's, without the bias of every head that cancels in ten blocks.

    Weights by position multiply the values by themselves here, in ten blocks, so that those by content need not be
    written out: 196² products per channel more than timm's.
    """
    counted, (parameters, heads, billions, dim) = families.models()[name]["counted"], SIZES[name]
    assert counted["parameters"] == parameters - 10 * heads
    assert (counted["multiply_adds"] - 10 * 196**2 * dim) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("size", [64, *(pytest.param(size, marks=pytest.mark.full) for size in (160, 224))])
def test_it_is_timm_s_with_its_weights(size):
    """Of squares alone, for which timm takes every map."""
    oracle.equal("convit_tiny", narrow(size), size, dim=32, num_heads=4)


@pytest.mark.full
def test_nine_heads_of_48_channels_are_timm_s():
    oracle.equal("convit_small", timm.create_model("convit_small"), 224, images=1)


def test_the_class_token_joins_before_the_last_blocks(recorder):
    model = ConViT(recorder, (32, 40), 5, depth=12, **small)
    assert [site.grid.prefix for site in recorder.sites] == [0] * 10 + [1] * 2
    assert {site.grid[:2] for site in recorder.sites} == {(4, 5)} and {site.stage for site in recorder.sites} == {0}
    assert [len(stage.blocks) for stage in model.stages] == [4, 3, 3, 2]
    assert model.stem.position.table.shape == (1, 20, 16) and model.grids[-1] == Grid(4, 5, 1)
    images = torch.randn(2, 3, 32, 40)
    tokens = model.eval().forward_features(images)
    assert tokens.shape == (2, 21, 16)
    torch.testing.assert_close(model(images), model.head(tokens[:, 0]))
    assert [m.shape for m in model.forward_pyramid(images)] == [(2, 16, 4, 5)] * 4
    assert model.no_weight_decay() == {"stem.position.table", "stages.3.downsample.class_token"}


def test_without_a_class_token_the_mean_decides(recorder):
    model = ConViT(recorder, 32, 5, depth=4, token_before=2, class_token=False, **small).eval()
    assert {site.grid.prefix for site in recorder.sites} == {0}
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), model.head(model.forward_features(images).mean(1)))


def test_first_blocks_are_gated_and_the_last_ones_are_not():
    with torch.device("meta"):
        model = create_model("convit_tiny")
    cores = [type(block.attn.core).__name__ for stage in model.stages for block in stage.blocks]
    assert cores == ["GatedPositionalCore"] * 10 + ["SoftmaxCore"] * 2
    assert not any(name.endswith("qkv.bias") for name, _ in model.named_parameters())


@torch.no_grad()
def test_a_wide_map_is_the_high_one_transposed():
    """timm takes as many patches for a square."""
    torch.manual_seed(0)
    model = create_model("convit_tiny", num_classes=5, dim=32, num_heads=4, image_size=64).eval()
    images = torch.randn(1, 3, 64, 128)
    before = model(images)
    patches, table = model.stem.patch_embed.proj.weight, model.stem.position.table
    patches.copy_(patches.mT.clone())
    table.copy_(table.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2))
    for stage in model.stages:
        for block in stage.blocks:
            if hasattr(block.attn.core, "position"):
                weight = block.attn.core.position.weight
                weight.copy_(weight[:, [1, 0, 2]])
    torch.testing.assert_close(model(images.mT), before, rtol=1e-4, atol=1e-5)


def test_values_of_the_gated_blocks_alone_start_as_the_tokens():
    torch.manual_seed(0)
    model = create_model("convit_tiny", num_classes=5, dim=32, num_heads=4, image_size=32)
    gpsa(model, only_gated=True)
    blocks = [block for stage in model.stages for block in stage.blocks]
    identity = [torch.equal(block.attn.qkv.weight[64:], torch.eye(32)) for block in blocks]
    assert identity == [True] * 10 + [False] * 2


def test_blocks_that_are_none_are_refused(recorder):
    with pytest.raises(
        ValueError, match=r"ConViT: token_before must be one of the 4 blocks, .*, got 4; set model.token"
    ):
        ConViT(recorder, 32, 5, depth=4, token_before=4, **small)
    with pytest.raises(
        ValueError, match=r"ConViT: token_before must be a whole number of at least 1, got 0; set model"
    ):
        ConViT(recorder, 32, 5, depth=4, token_before=0, **small)


def test_an_attention_that_takes_no_class_token_is_refused_where_there_is_one():
    with pytest.raises(
        ValueError, match=r"2 of 12 places[\s\S]*blocks 10-11 .*grid 14x14\+1.*set model.class_token=false"
    ):
        create_model("convit_tiny", attention="gpsa")
    with torch.device("meta"):
        create_model("convit_tiny", attention="gpsa", class_token=False)
