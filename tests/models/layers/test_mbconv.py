"""MBConv: the residual form, the widths, the start of its weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.attention import Grid
from models.layers.mbconv import Form, MBConv, MBConvBlock, SameConv2d, init_convolutions
from models.layers.tokens import to_map, to_tokens

torch.manual_seed(0)


def test_it_is_the_shortcut_plus_the_body():
    block, x = MBConv(8, 8).eval(), torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(block(x), x + block.body(x))
    assert isinstance(block.shortcut, nn.Identity)


def test_a_stride_pools_the_shortcut():
    block, x = MBConv(8, 12, stride=2).eval(), torch.randn(2, 8, 5, 6)
    pooled = F.max_pool2d(F.pad(x, (0, 0, 0, 1), value=float("-inf")), 2)
    torch.testing.assert_close(block(x), block.shortcut(pooled) + block.body(x))
    assert block(x).shape == (2, 12, 3, 3)


def test_widths_follow_the_output_channels():
    shapes = [tuple(m.weight.shape) for m in MBConv(8, 12).modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(48, 8, 1, 1), (48, 1, 3, 3), (3, 48, 1, 1), (48, 3, 1, 1), (12, 48, 1, 1), (12, 8, 1, 1)]


def test_as_a_block_it_works_on_tokens_and_has_no_losses():
    block, x, grid = MBConvBlock(8).eval(), torch.randn(2, 15, 8), Grid(3, 5)
    y, losses = block(x, grid)
    assert losses == {}
    torch.testing.assert_close(y, to_tokens(block.conv(to_map(x, grid))))


@pytest.mark.parametrize("groups", [1, 64])
def test_weights_start_with_the_variance_of_the_fan_out(groups):
    conv = nn.Conv2d(64, 64, 3, groups=groups)
    init_convolutions(conv)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64 / groups)) ** 0.5, rel=0.15)
    assert (conv.bias == 0).all()


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 6), (1, 2)])
def test_zeros_are_those_of_tensorflow(size):
    """Enough for ceil(side / 2) outputs, of which the smaller half stands in front."""
    conv, x = SameConv2d(3, 4), torch.randn(2, 3, *size)
    zeros = []
    for side in reversed(size):
        total = max((-(-side // 2) - 1) * 2 + 3 - side, 0)
        zeros += [total // 2, total - total // 2]
    torch.testing.assert_close(conv(x), F.conv2d(F.pad(x, zeros), conv.weight, conv.bias, stride=2))
    assert conv(x).shape[2:] == (-(-size[0] // 2), -(-size[1] // 2))


def test_a_form_changes_pooling_activations_norms_and_padding():
    form = Form(average=True, act=nn.ReLU, squeeze_act=nn.SiLU, norm_eps=1e-3, norm_momentum=0.01, same=True)
    block, x = MBConv(8, 8, stride=2, form=form).eval(), torch.randn(2, 8, 5, 6)
    assert [type(layer) for layer in block.body[3:7]] == [nn.ReLU, SameConv2d, nn.BatchNorm2d, nn.ReLU]
    assert isinstance(block.body[7].act, nn.SiLU)
    assert {(m.eps, m.momentum) for m in block.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-3, 0.01)}
    pooled = F.avg_pool2d(x, 2, ceil_mode=True)
    torch.testing.assert_close(pooled[:, :, 2, 0], x[:, :, 4, :2].mean(-1))
    torch.testing.assert_close(block(x), pooled + block.body(x))
