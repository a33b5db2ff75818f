"""Halving a map: equal to timm's merging, whole cells on odd maps, no pixel lost."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging as TimmPatchMerging
from torch import nn

from models.attention import Grid
from models.layers.downsample import ConvDownsample, PatchMerging, PoolDownsample, reduced
from models.layers.mbconv import MBConvDownsample
from models.layers.tokens import to_map, to_tokens

SIZES = [(4, 6), (5, 6), (4, 7), (5, 7), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_patch_merging_equals_timm(size):
    torch.manual_seed(0)
    ours, theirs = PatchMerging(8, 12), TimmPatchMerging(8, 12)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *size, 8)
    y, grid = ours(x.flatten(1, 2), Grid(*size))
    expected = theirs(x)
    assert grid == Grid(*expected.shape[1:3])
    torch.testing.assert_close(y, expected.flatten(1, 2))


@pytest.mark.parametrize("make", [PatchMerging, ConvDownsample, PoolDownsample, MBConvDownsample])
@pytest.mark.parametrize("size", SIZES)
def test_every_cell_reaches_the_output(make, size):
    torch.manual_seed(0)
    module, x = make(8, 12).eval(), torch.randn(16, size[0] * size[1], 8, requires_grad=True)
    y, grid = module(x, Grid(*size))
    assert grid == Grid(-(-size[0] // 2), -(-size[1] // 2)) and y.shape == (16, grid.tokens, 12)
    y.square().sum().backward()
    assert (x.grad.abs().sum((0, 2)) > 0).all()


def test_conv_downsample_is_a_strided_convolution_of_the_normalised_map():
    torch.manual_seed(0)
    module, x = ConvDownsample(8, 12, norm=nn.LayerNorm(8)), torch.randn(2, 24, 8)
    expected = F.conv2d(to_map(module.norm(x), Grid(4, 6)), module.conv.weight, module.conv.bias, stride=2)
    torch.testing.assert_close(module(x, Grid(4, 6))[0], to_tokens(expected))


def test_pool_downsample_keeps_the_map_at_stride_one():
    torch.manual_seed(0)
    module, x = PoolDownsample(8, 12, stride=1), torch.randn(2, 15, 8)
    y, grid = module(x, Grid(3, 5))
    assert grid == Grid(3, 5)
    torch.testing.assert_close(y, module.proj(x))


def test_reduced_keeps_the_type_and_the_rest():
    assert reduced(Grid(5, 8, 1)) == Grid(3, 4, 1) and reduced(Grid(5, 8), 1) == Grid(5, 8)
