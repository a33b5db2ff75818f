"""MaxViT: timm's results with its weights, the paper's sizes, what a block is made of, maps that nothing divides."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from conf import families
from models import create_model
from models.attention import Grid
from models.backbones.maxvit import MaxViT
from models.layers.block import Block
from models.layers.mbconv import MBConvBlock
from tests.models.backbones import oracle

# parameters of timm's models to the unit; billions of multiply-adds as PyTorch counts timm's, at 224 pixels
SIZES = {
    "maxvit_tiny": (30_916_528, 5.552),
    "maxvit_small": (68_927_956, 11.589),
    "maxvit_base": (119_467_708, 23.922),
    "maxvit_large": (211_785_560, 43.520),
}
SHORT = {"dims": [64, 64, 96, 128], "depths": [1, 2, 1, 1]}
small = {"dims": (16, 24), "depths": (2, 1), "stem_dim": 8, "head_dim": 8}


def short(size):
    """timm's model with fewer channels and blocks; its windows and grids have size / 32 cells."""
    shape = {"embed_dim": tuple(SHORT["dims"]), "depths": tuple(SHORT["depths"]), "head_hidden_size": 128}
    return timm.create_model("maxvit_tiny_tf_224", img_size=size, **shape)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds(name):
    """As recorded, which tests/models/test_tables.py counts."""
    counted, (parameters, billions) = families.models()[name]["counted"], SIZES[name]
    assert counted["parameters"] == parameters
    assert counted["multiply_adds"] / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    "size", [(64, 96), *(pytest.param(size, marks=pytest.mark.full) for size in (224, 384, (224, 320)))]
)
def test_it_is_timm_s_with_its_weights(size):
    """At sizes that 32 divides; timm takes no others."""
    oracle.equal("maxvit_tiny", short(size), size, **SHORT)


@pytest.mark.full
def test_whole_widths_are_timm_s():
    shape = {"depths": [1, 1, 2, 1], "stem_dim": 128, "dims": [128, 256, 512, 1024]}
    theirs = timm.create_model("maxvit_large_tf_224", depths=(1, 1, 2, 1))
    oracle.equal("maxvit_large", theirs, 224, images=1, **shape)


def test_a_block_is_a_convolution_a_window_and_a_grid(recorder):
    model = MaxViT(recorder, (40, 72), 5, **small)
    assert [(s.dim, s.num_heads, s.grid, s.stage, s.block, s.depth, s.image_size) for s in recorder.sites] == [
        *((16, 2, Grid(10, 18), 0, block, 4, (40, 72)) for block in range(4)),
        *((24, 3, Grid(5, 9), 1, block, 2, (40, 72)) for block in range(2)),
    ]
    assert [type(block) for block in model.stages[0].blocks] == [Block, Block, MBConvBlock, Block, Block]
    assert [type(block) for block in model.stages[1].blocks] == [Block, Block]
    assert model.strides == [4, 8] and model.stages[0].downsample.conv.stride == 2
    assert {block.mlp.act.approximate for block in model.modules() if isinstance(block, Block)} == {"tanh"}


@pytest.mark.parametrize(("pixels", "sides"), [(224, (7, 7)), (384, (12, 12)), (512, (16, 16)), ((224, 288), (7, 9))])
def test_windows_and_grids_have_the_sides_of_the_image_over_32(pixels, sides):
    with torch.device("meta"):
        model = create_model("maxvit_tiny", image_size=pixels)
    mixers = [block.attn for stage in model.stages for block in stage.blocks if isinstance(block, Block)]
    assert {mixer.window for mixer in mixers} == {sides}
    assert [type(mixer.layout).__name__ for mixer in mixers[:4]] == ["Windows", "Dilated"] * 2


@torch.no_grad()
@pytest.mark.parametrize("at", [(64, 64), (72, 40), (31, 97)])
def test_maps_that_windows_and_grids_do_not_divide(at):
    """timm and the authors' code stop there."""
    torch.manual_seed(0)
    model = create_model("maxvit_32px", num_classes=5, image_size=(40, 56)).eval()
    assert model(torch.randn(2, 3, *at)).isfinite().all()
    sides = [tuple(-(-side // stride) for side in at) for stride in (4, 8)]
    assert [tuple(m.shape[2:]) for m in model.forward_pyramid(torch.randn(1, 3, *at))] == sides


def test_the_parts_of_a_block_have_one_drop_path(recorder):
    model = MaxViT(recorder, 32, 5, drop_path=0.2, **small)
    rates = [
        [stage.downsample.conv.drop_path.drop_prob, *(block.conv.drop_path.drop_prob for block in convolutions(stage))]
        for stage in model.stages
    ]
    assert rates == [[0.0, 0.1], [0.2]]
    attending = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks if hasattr(block, "mlp")]
    assert attending == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]


def convolutions(stage):
    return [block for block in stage.blocks if isinstance(block, MBConvBlock)]


def test_the_head_is_a_norm_a_layer_with_tanh_and_the_classifier(recorder):
    model = MaxViT(recorder, 32, 5, **small).eval()
    images = torch.randn(2, 3, 32, 32)
    mean = model.forward_features(images).mean(1)
    head = model.head_norm
    hidden = torch.tanh(head.fc(F.layer_norm(mean, (24,), head.norm.weight, head.norm.bias, 1e-5)))
    torch.testing.assert_close(model(images), model.head(hidden))


def test_weights_start_as_in_the_authors_code(recorder):
    torch.manual_seed(0)
    model = MaxViT(recorder, 32, 5, **small | {"dims": (64, 96)})
    stds = [m.weight.std().item() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert stds == pytest.approx([0.02] * len(stds), rel=0.2)
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert biases and not any(bias.any() for bias in biases)


def test_a_norm_of_the_model_is_also_that_of_the_head():
    model = create_model("maxvit_32px", num_classes=5, norm="rmsnorm")
    assert isinstance(model.head_norm.norm, nn.RMSNorm)


def test_channels_are_whole_heads(recorder):
    with pytest.raises(ValueError, match=r"MaxViT: 24 channels are not a multiple of head_dim, got 16; change model"):
        MaxViT(recorder, 32, 5, **small | {"head_dim": 16})
    with pytest.raises(ValueError, match=r"MaxViT: .*differ in length, got .*'depths': 1.*; give as many of each"):
        MaxViT(recorder, 32, 5, **small | {"depths": (1,)})
