"""Depth-wise convolution as a mixer: the map, gates, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from models.attention import Grid, Refused, Site, build
from models.attention.conv import conv
from models.layers.tokens import to_map, to_tokens

site = Site(8, 2, Grid(3, 5), 0, 0, 1, "convnet")


def test_it_is_a_depthwise_convolution_of_the_map():
    torch.manual_seed(0)
    mixer, x = conv(site), torch.randn(2, 15, 8)
    y, losses, _ = mixer(x, Grid(3, 5))
    expected = F.conv2d(to_map(x, Grid(3, 5)), mixer.proj.weight, mixer.proj.bias, padding=3, groups=8)
    torch.testing.assert_close(y, to_tokens(expected))
    assert losses == {} and mixer.proj.weight.shape == (8, 1, 7, 7)


def test_any_map_and_any_kernel():
    mixer = conv(site, kernel_size=3)
    assert mixer(torch.randn(1, 28, 8), Grid(4, 7)).x.shape == (1, 28, 8)


def test_gates_weight_heads():
    mixer, x = conv(site), torch.randn(2, 15, 8)
    plain = mixer(x, Grid(3, 5)).x
    assert torch.equal(mixer(x, Grid(3, 5), torch.ones(2, 15, 2)).x, plain)
    gates = torch.zeros(2, 15, 2)
    gates[..., 1] = 3
    gated = mixer(x, Grid(3, 5), gates).x
    assert (gated[..., :4] == 0).all()
    torch.testing.assert_close(gated[..., 4:], 3 * plain[..., 4:])


@pytest.mark.parametrize("size", [0, 4])
def test_even_kernels_are_refused(size):
    with pytest.raises(ValueError, match=rf"conv: kernel_size must be odd, got {size}; set attention.kernel_size"):
        conv(site, kernel_size=size)


def test_class_tokens_and_uneven_heads_are_refused():
    with pytest.raises(ValueError, match=r"cannot take the 1 class token\(s\) in front of it; set model.class_token"):
        build(conv, [site._replace(grid=Grid(3, 5, 1))])
    with pytest.raises(Refused, match="8 channels do not divide into 3 heads"):
        conv(site._replace(num_heads=3))
