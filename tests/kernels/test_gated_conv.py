"""What is particular to the gated convolution."""

import pytest
import torch
from torch.nn import functional as F

from kernels.depthwise_conv import depthwise_conv
from kernels.gated_conv import gated_conv
from kernels.gated_conv.cases import OPERATION, inputs

reference = OPERATION.reference


def test_is_the_product_of_the_value_and_of_an_activated_convolution_of_the_gate():
    x, weight, bias = torch.randn(2, 6 * 9, 32), torch.randn(16, 1, 5, 5), torch.randn(16)
    gate, value = x.chunk(2, dim=-1)
    convolved = F.conv2d(gate.unflatten(1, (6, 9)).permute(0, 3, 1, 2), weight, bias, padding=2, groups=16)
    wanted = F.gelu(convolved.permute(0, 2, 3, 1).flatten(1, 2)) * value
    torch.testing.assert_close(gated_conv(x, (6, 9), weight, bias), wanted, rtol=1e-5, atol=1e-5)


def test_a_value_of_one_leaves_the_convolution_and_a_value_of_zero_nothing():
    x, weight, bias = torch.randn(1, 5 * 7, 8), torch.randn(8, 1, 3, 3), torch.randn(8)
    alone = depthwise_conv(x, (5, 7), weight, bias, gelu=True)
    assert torch.equal(gated_conv(torch.cat([x, torch.ones_like(x)], -1), (5, 7), weight, bias), alone)
    assert not gated_conv(torch.cat([x, torch.zeros_like(x)], -1), (5, 7), weight, bias).any()


def test_the_value_of_a_token_reaches_its_own_output_alone_and_its_gate_those_around():
    """By gradients, which are those of a packed projection as a whole."""
    kw = inputs("cpu", torch.float32, batch=1, grid=(5, 5, 1), dim=8)
    direction = torch.zeros(1, 26, 8)
    direction[:, 1 + 2 * 5 + 2] = 1  # the token in the middle
    (gradient,) = torch.autograd.grad(gated_conv(**kw), kw["x_BNL"], direction)
    gate, value = (half.ne(0).any(-1)[0] for half in gradient.chunk(2, dim=-1))
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    around = ((rows - 2).abs() <= 1) & ((columns - 2).abs() <= 1)
    assert torch.equal(gate[1:], around.flatten()) and not gate[0]
    assert value.nonzero().flatten().tolist() == [1 + 2 * 5 + 2]


@pytest.mark.parametrize("held", ["transposed", "part of a wider projection"])
def test_takes_a_projection_that_lies_anywhere(held):
    kw = inputs("cpu", torch.float32, batch=2, grid=(3, 5), dim=8)
    x = kw.pop("x_BNL").detach()
    other = x.mT.contiguous().mT if held == "transposed" else torch.cat([x, x, x], -1)[..., 16:32]
    assert not other.is_contiguous()
    found = [gated_conv(t.requires_grad_(), **kw) for t in (x, other)]
    assert torch.equal(*found)
    assert torch.equal(*(torch.autograd.grad(y.sum(), t)[0] for y, t in zip(found, (x, other), strict=True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": (4, 5)},
            r"gated_conv: x must be \(B, 0 \+ 4\*5, 2\*8\), got \(1, 16, 16\); pass gate and value of this map, packed",
        ),
        ({"x_BNL": torch.zeros(1, 16, 8)}, r"x must be \(B, 0 \+ 4\*4, 2\*8\), got \(1, 16, 8\); pass gate and value"),
        ({"weight": torch.zeros(8, 1, 4, 4)}, r"weight must be \(C, 1, k, k\) with odd k, got \(8, 1, 4, 4\)"),
        ({"weight": torch.zeros(8, 1, 9, 9)}, r"the kernels go up to 7x7 weights, got 9; use backend=torch"),
        ({"bias": torch.zeros(4)}, r"bias must be \(8,\), got \(4,\); give one number per channel"),
    ],
)
def test_refuses(change, message):
    kw = {"x_BNL": torch.zeros(1, 16, 16), "grid": (4, 4), "weight": torch.zeros(8, 1, 3, 3), "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        gated_conv(**{**kw, **change})
