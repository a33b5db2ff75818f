"""What is particular to the depth-wise convolution."""

import pytest
import torch
from torch.nn import functional as F

from kernels.depthwise_conv import depthwise_conv
from kernels.depthwise_conv import triton as fused
from kernels.depthwise_conv.cases import OPERATION, inputs

reference = OPERATION.reference


def test_is_conv2d():
    x, weight, bias = torch.randn(2, 6 * 9, 16), torch.randn(16, 1, 5, 5), torch.randn(16)
    wanted = F.conv2d(x.unflatten(1, (6, 9)).permute(0, 3, 1, 2), weight, bias, padding=2, groups=16)
    found = depthwise_conv(x, (6, 9), weight, bias)
    torch.testing.assert_close(found, wanted.permute(0, 2, 3, 1).flatten(1, 2))


def test_a_single_one_in_the_middle_is_the_identity():
    x = torch.randn(1, 2 + 5 * 3, 24)
    weight = torch.zeros(24, 1, 7, 7)
    weight[:, :, 3, 3] = 1
    y = depthwise_conv(x, (5, 3, 2), weight)
    assert torch.equal(y[:, 2:], x[:, 2:]) and not y[:, :2].any()


def test_adds_in_place_to_what_is_there(poisoned):
    """Other operations add their convolution to their own output, and its gradient to one that they hold."""
    kw = inputs("cpu", torch.float32, batch=2, grid=(5, 6, 1), dim=32)
    x, weight, bias = kw["x_BNC"].detach(), kw["weight"].detach(), kw["bias"].detach()
    there = torch.randn(x.shape)
    wanted = there + reference(x, (5, 6, 1), weight, bias)
    out = there.clone()
    fused.forward(x, weight, bias, out, (5, 6, 1), residual=out)
    torch.testing.assert_close(out, wanted)
    total = there.clone()
    fused.input_gradient(x, weight, total, (5, 6, 1), add=True)
    flipped = reference(x, (5, 6, 1), weight.flip(2, 3))
    torch.testing.assert_close(total, there + flipped)


def test_autocast_leaves_the_residual_stream_in_float32():
    kw = inputs("cpu", torch.float32, batch=1, grid=(4, 4), dim=16, residual=True)
    kw["residual"] = (1 + 1e-4 * torch.randn(1, 16, 16)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_conv(**{**kw, "weight": torch.zeros(16, 1, 3, 3), "bias": None})
    assert out.dtype == torch.float32 and torch.equal(out, kw["residual"])
    (gradient,) = torch.autograd.grad(out.sum(), kw["residual"])
    assert torch.equal(gradient, torch.ones_like(out))


# with 49 weights a hundred places take seconds
SIZES, SLOW = ((1, 1), (3, 33), (13, 1), (49, 2)), {(7, (3, 33)), (7, (49, 2))}


@pytest.mark.parametrize(
    ("kernel", "size"),
    [
        pytest.param(kernel, size, id=f"{kernel}-{size}", marks=[pytest.mark.full] if (kernel, size) in SLOW else [])
        for kernel in (1, 3, 7)
        for size in SIZES
    ],
)
def test_any_map(kernel, size):
    kw = inputs("cpu", torch.float32, batch=1, grid=size, dim=8, kernel=kernel)
    torch.testing.assert_close(depthwise_conv(**kw), reference(**kw), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": (4, 5)},
            r"depthwise_conv: x must be \(B, 0 \+ 4\*5, C\), got \(1, 16, 8\); pass the grid of this map",
        ),
        ({"weight": torch.zeros(8, 1, 4, 4)}, r"weight must be \(8, 1, k, k\) with odd k, got \(8, 1, 4, 4\)"),
        ({"weight": torch.zeros(8, 1, 9, 9)}, r"the kernels go up to 7x7 weights, got 9; use backend=torch"),
        ({"bias": torch.zeros(4)}, r"bias must be \(8,\), got \(4,\); give one number per channel"),
        ({"residual": torch.zeros(1, 9, 8)}, r"residual must be shaped as x \(1, 16, 8\), got \(1, 9, 8\)"),
    ],
)
def test_refuses(change, message):
    kw = {"x_BNC": torch.zeros(1, 16, 8), "grid": (4, 4), "weight": torch.zeros(8, 1, 3, 3), "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**{**kw, **change})
