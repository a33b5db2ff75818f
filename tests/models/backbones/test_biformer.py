"""BiFormer: the sizes of the paper, any image, and what it refuses."""

import pytest
import torch
from torch import nn

from conf import families
from models import create_model
from models.attention import Grid, Site
from models.attention.biformer import BiLevelRoutingAttention
from models.attention.dual import Positioned
from models.layers.position import ConvPosition

# parameters and multiply-adds of one 224-pixel image (fvcore, which also counts norms) of the authors' code
SIZES = {
    "biformer_tiny": (13_142_760, 2.228e9),
    "biformer_small": (25_536_232, 4.487e9),
    "biformer_base": (56_804_968, 9.795e9),
    "biformer_stl": (28_372_552, 4.590e9),
    "biformer_stl_nchw": (28_372_552, 4.593e9),
}
SMALL = {"dims": [16, 32, 32, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "num_classes": 5}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_flops(name):
    """As recorded, which tests/models/test_tables.py counts."""
    counted = families.models()[name]["counted"]
    assert counted["parameters"] == SIZES[name][0]
    assert counted["multiply_adds"] == pytest.approx(SIZES[name][1], rel=0.01)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
@pytest.mark.parametrize("size", [(224, 224), (96, 130), (33, 260)])
def test_any_size_and_aspect(name, size):
    torch.manual_seed(0)
    model = create_model(name, **SMALL).train()
    logits = model(torch.randn(2, 3, *size))
    logits.square().sum().backward()
    assert logits.shape == (2, 5) and logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    maps = create_model(name, features_only=True, **SMALL)(torch.randn(1, 3, *size))
    assert [x.shape[2:] for x in maps] == [torch.Size(-(-side // s) for side in size) for s in (4, 8, 16, 32)]


def test_drop_path_grows_over_all_blocks():
    model = create_model("biformer_small", drop_path=0.15, **(SMALL | {"depths": [4, 4, 18, 4]}))
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.15 * i / 29 for i in range(30)])


def test_another_attention_takes_the_place_of_routing():
    model = create_model("biformer_tiny", attention="agent", **SMALL)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 5)


def test_a_mechanism_brings_no_second_position_encoding():
    model = create_model("biformer_tiny", attention="dual", **SMALL)
    assert [type(m) for m in model.modules() if isinstance(m, ConvPosition | Positioned)] == [ConvPosition] * 5
    swin = create_model("biformer_stl", attention="dual", **SMALL)
    assert sum(isinstance(m, Positioned) for m in swin.modules()) == 5


def test_batch_norm_of_tokens_is_that_of_the_map():
    torch.manual_seed(0)
    model = create_model("biformer_tiny", **SMALL)
    theirs, x = nn.BatchNorm2d(64), torch.randn(3, 64, 2, 4)
    expected = theirs(x)
    got = model.norm.train()(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(got.transpose(1, 2).unflatten(2, (2, 4)), expected)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(model.norm.bn.state_dict()[key], value)


def test_batch_norms_can_be_synchronised():
    """What `trainer.sync_batchnorm=true` does; on one process the results are the same."""
    torch.manual_seed(0)
    model = create_model("biformer_tiny", **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()(images), expected)


def test_smaller_maps_are_padded_to_the_grid_of_regions():
    """As the authors pad, where the model was built for larger maps; a model built for them has fewer regions."""
    site = Site(32, 2, Grid(14, 14), 2, 0, 1, "hierarchical")
    module, x = BiLevelRoutingAttention(site, num_regions=7, topk=4), torch.randn(2, 30, 32)
    padded = nn.functional.pad(x.unflatten(1, (5, 6)), (0, 0, 0, 1, 0, 2)).flatten(1, 2)
    expected = module(padded, Grid(7, 7)).x.unflatten(1, (7, 7))[:, :5, :6].flatten(1, 2)
    torch.testing.assert_close(module(x, Grid(5, 6)).x, expected)
    assert module.routes(x, Grid(5, 6)).shape == (2, 49, 4)
    small = BiLevelRoutingAttention(site._replace(grid=Grid(5, 6)), num_regions=7, topk=4)
    assert small.routes(x, Grid(5, 6)).shape == (2, 30, 4)


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match=r"BiFormer: layout must be biformer or swin, got 'cswin'; set model.layout"):
        create_model("biformer_tiny", layout="cswin")
    with pytest.raises(ValueError, match=r"topk=60 is more than the 7x7 regions of a 56x56 map; set attention.topk to"):
        create_model("biformer_tiny", topk=[60, 4, 16, "all"])
    with pytest.raises(ValueError, match=r"stage 2 blocks 0-7 .*topk=16 is more than the 2x2 regions of a 2x2 map;"):
        create_model("biformer_tiny", image_size=32)
