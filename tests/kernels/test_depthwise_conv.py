"""What is particular to the depth-wise convolution."""

import pytest
import torch
from torch.nn import functional as F

from kernels.depthwise_conv import depthwise_conv
from kernels.depthwise_conv import triton as fused
from kernels.depthwise_conv import triton_backward as fused_backward
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


def test_gelu_is_exact_to_a_millionth_and_passes_what_is_not_finite():
    """With a single weight of 1; an infinite sum is GELU's limit, as it is where half precision has overflowed."""
    x = torch.cat([torch.linspace(-12, 12, 961), torch.tensor([1e4, -1e4, -0.0, 1e-30])])
    weight = torch.ones(1, 1, 1, 1)

    def convolved(x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv(x.view(1, -1, 1), (1, len(x)), weight, gelu=True).flatten()

    x = x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, wanted = convolved(x), F.gelu(wide)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-7, atol=1e-6)
    found, wanted = torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), wide)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=2e-7, atol=2e-6)
    found = convolved(torch.tensor([float("inf"), float("nan"), 0.0]))
    assert found[0] == float("inf") and found[1].isnan() and found[2] == 0


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
    fused_backward.gradients(x, x, weight, total, (5, 6, 1), other=total)
    flipped = reference(x, (5, 6, 1), weight.flip(2, 3))
    torch.testing.assert_close(total, there + flipped)


@pytest.mark.parametrize("kernel", [3, pytest.param(5, marks=pytest.mark.full)])
def test_weight_gradients_are_the_same_alone_and_with_that_of_the_input(kernel, poisoned):
    """Alone where another kernel has the gradient of the input; the sums are added up in the same order."""
    kw = inputs("cpu", torch.float32, batch=2, grid=(9, 5, 1), dim=16, kernel=kernel)
    x, weight = kw["x_BNC"].detach(), kw["weight"].detach()
    grad, dx = torch.randn(x.shape), torch.empty(x.shape)
    together = fused_backward.gradients(grad, x, weight, dx, (9, 5, 1))
    alone = fused_backward.weight_gradient(grad, x, weight, (9, 5, 1))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not dx[:, :1].any() and dx[:, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("batch", "multiprocessors"),
    [pytest.param(3, 1, id="images in turn"), pytest.param(1, 132, id="rows of an image apart")],
)
def test_any_division_of_images_among_programs(batch, multiprocessors, monkeypatch):
    """On a small GPU a program goes through several images; one image on a large GPU is cut into parts of 8 rows."""
    monkeypatch.setattr(fused, "MULTIPROCESSORS", multiprocessors)
    monkeypatch.setattr(fused_backward, "MULTIPROCESSORS", multiprocessors)
    monkeypatch.setattr(fused, "turns", lambda work, most: max(1, min(most, work // multiprocessors)))
    kw = inputs("cpu", torch.float32, batch=batch, grid=(17, 9), dim=8, kernel=3, residual=True, gelu=True)
    leaves = [t for t in kw.values() if isinstance(t, torch.Tensor)]
    found, wanted = depthwise_conv(**kw), reference(**kw)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn(found.shape)
    found = torch.autograd.grad(found, leaves, direction)
    for a, b in zip(found, torch.autograd.grad(wanted, leaves, direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


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
