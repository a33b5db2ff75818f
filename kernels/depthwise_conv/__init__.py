"""Depth-wise convolution of token maps: every channel convolved with its own k×k weights, channels last.

    y = conv(x) + bias;   y = gelu(y) if asked;   y = y + residual if given

x is (B, N, C) with N = prefix + H·W tokens in row-major order and may be strided, e.g. the values inside a projection
(B, N, 3C). Prefix tokens take no part: their output is zero, or the residual. Zero padding, stride 1, odd k.
Everything is accumulated in float32. Used as LePE, position encoding, and value convolution by every mechanism here.

Source: the operation is `torch.nn.functional.conv2d(..., groups=C)`; GELU is the exact one, Hendrycks and Gimpel, 2016,
arXiv:1606.08415.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import autocast, check_tensors, is_fused
from kernels.operation import Cost, Operation
from kernels.registration import define

WHO = "depthwise_conv"
LARGEST = 7


def depthwise_conv(
    x_BNC: Tensor,
    grid: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gelu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`gelu(conv(x) + bias) + residual`, (B, N, C) in the wider dtype of x and the residual.

    Under autocast the convolution is computed in autocast's dtype, and a float32 residual stays as it is.

    Args:
        x_BNC: tokens, prefix first.
        grid: (height, width) or (height, width, prefix).
        weight: (C, 1, k, k) as in `nn.Conv2d`, k odd.
        bias: (C,), or None.
        residual: (B, N, C) added at the end, or None.
        gelu: apply GELU before the residual.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a kernel side above 7 on the fused path.
    """
    prefix = grid[2] if len(grid) > 2 else 0
    _check(x_BNC, grid, prefix, weight, bias, residual)
    if not is_fused(WHO, backend, x_BNC):
        return reference(x_BNC, grid, weight, bias, residual=residual, gelu=gelu)
    (x_BNC,) = autocast(x_BNC)
    check_tensors(WHO, {"x": x_BNC}, {"weight": weight, "bias": bias, "residual": residual})
    if weight.shape[-1] > LARGEST:
        raise ValueError(
            f"{WHO}: the kernels go up to {LARGEST}x{LARGEST} weights, got {weight.shape[-1]}; use backend=torch"
        )
    return _DepthwiseConv.apply(x_BNC, weight, bias, residual, grid[0], grid[1], prefix, gelu)


def reference(
    x_BNC: Tensor,
    grid: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """The definition in plain PyTorch."""
    height, width, prefix = (*grid, 0)[:3]
    x_BCHW = x_BNC[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
    parameters = (p if p is None else p.to(x_BNC.dtype) for p in (weight, bias))
    y_BCHW = F.conv2d(x_BCHW, *parameters, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    y_BNC = y_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
    y_BNC = F.gelu(y_BNC) if gelu else y_BNC
    y_BNC = F.pad(y_BNC, (0, 0, prefix, 0)) if prefix else y_BNC
    return y_BNC if residual is None else y_BNC + residual


def _check(
    x: Tensor, grid: tuple[int, ...], prefix: int, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> None:
    if x.dim() != 3 or x.shape[1] != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"{WHO}: x must be (B, {prefix} + {grid[0]}*{grid[1]}, C), got {tuple(x.shape)}; pass the grid of this map"
        )
    C, k = x.shape[2], weight.shape[-1]
    if tuple(weight.shape) != (C, 1, k, k) or k % 2 == 0:
        raise ValueError(f"{WHO}: weight must be ({C}, 1, k, k) with odd k, got {tuple(weight.shape)}; see nn.Conv2d")
    if bias is not None and tuple(bias.shape) != (C,):
        raise ValueError(f"{WHO}: bias must be ({C},), got {tuple(bias.shape)}; give one number per channel")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{WHO}: residual must be shaped as x {tuple(x.shape)}, got {tuple(residual.shape)}; crop it")


# Registration


def _forward(x, weight, bias, residual, height, width, prefix, gelu):
    from kernels.depthwise_conv import triton as fused

    out = torch.empty(x.shape, dtype=_dtype(x, residual), device=x.device)
    return fused.forward(x, weight, bias, out, (height, width, prefix), residual=residual, gelu=gelu)


def _backward(grad, x, weight, bias, height, width, prefix, gelu):
    from kernels.depthwise_conv import triton as fused

    return fused.backward(grad, x, weight, bias, (height, width, prefix), gelu=gelu)


def _dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _fake_forward(x, weight, bias, residual, height, width, prefix, gelu):
    return x.new_empty(x.shape, dtype=_dtype(x, residual))


def _fake_backward(grad, x, weight, bias, height, width, prefix, gelu):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _flops(x, weight, bias, residual, height, width, *_, out_shape=None, **__):
    return 2 * x[0] * height * width * x[2] * weight[-1] ** 2


def _flops_backward(grad, x, weight, bias, height, width, *_, out_shape=None, **__):
    return 4 * x[0] * height * width * x[2] * weight[-1] ** 2


_SIZES = "SymInt height, SymInt width, int prefix, bool gelu"
forward_op = define(
    f"depthwise_conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {_SIZES}) -> Tensor",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    f"depthwise_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, {_SIZES})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, *sizes):
        ctx.save_for_backward(x, weight, bias)
        ctx.sizes, ctx.residual_dtype = sizes, None if residual is None else residual.dtype
        return forward_op(x, weight, bias, residual, *sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = backward_op(grad, x, weight, bias, *ctx.sizes)
        residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None
        return dx, dweight, dbias if bias is not None else None, residual, *[None] * len(ctx.sizes)


# Shapes for the tests and the benchmark


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    dim: int,
    kernel: int = 3,
    residual: bool = False,
    gelu: bool = False,
    packed: int = 1,
) -> dict:
    """Keyword arguments of `depthwise_conv`; `packed` = 3 takes x out of a projection (B, N, 3C)."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = sum(grid[2:]) + grid[0] * grid[1]

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x = random(batch, tokens, packed * dim, dtype=dtype)[..., (packed - 1) * dim :]
    return {
        "x_BNC": x.detach().requires_grad_(),
        "grid": grid,
        "weight": (random(dim, 1, kernel, kernel) / kernel).requires_grad_(),
        "bias": random(dim).requires_grad_(),
        "residual": random(batch, tokens, dim, dtype=dtype).requires_grad_() if residual else None,
        "gelu": gelu,
    }


def cost(
    itemsize: int, *, batch: int, grid: tuple[int, ...], dim: int, kernel: int = 3, residual: bool = False, **_
) -> Cost:
    """Forward reads x (and the residual) and writes y; backward reads x and the gradient and writes that of x."""
    tensor = batch * (sum(grid[2:]) + grid[0] * grid[1]) * dim
    flops = 2 * tensor * kernel**2
    return Cost((2 + residual) * tensor * itemsize, 3 * tensor * itemsize, flops, 2 * flops)


CHECKS = {
    "one token": {"batch": 1, "grid": (1, 1), "dim": 16},
    "7 tokens, wide": {"batch": 2, "grid": (1, 7), "dim": 24, "kernel": 5},
    "7x7": {"batch": 2, "grid": (7, 7), "dim": 72, "kernel": 7},
    "9x7 with prefix, residual": {"batch": 1, "grid": (9, 7, 1), "dim": 32, "residual": True},
    "5x20, gelu, values of a projection": {"batch": 2, "grid": (5, 20), "dim": 96, "gelu": True, "packed": 3},
    "6x6, gelu and residual": {"batch": 1, "grid": (6, 6, 2), "dim": 48, "gelu": True, "residual": True, "kernel": 5},
}
STAGES = {
    "k3 224 px stage 1": {"batch": 128, "grid": (56, 56), "dim": 96, "packed": 3},
    "k3 224 px stage 2": {"batch": 128, "grid": (28, 28), "dim": 192, "packed": 3},
    "k3 224 px stage 3": {"batch": 128, "grid": (14, 14), "dim": 384, "packed": 3},
    "k3 224 px stage 4": {"batch": 128, "grid": (7, 7), "dim": 768, "packed": 3},
    "k5 224 px stage 1": {"batch": 128, "grid": (56, 56), "dim": 96, "kernel": 5, "packed": 3},
    "k5 224 px stage 3": {"batch": 128, "grid": (14, 14), "dim": 384, "kernel": 5, "packed": 3},
    "k7 224 px stage 1 (ConvNeXt)": {"batch": 128, "grid": (56, 56), "dim": 96, "kernel": 7},
    "k3 gelu 224 px stage 1 (PVTv2 MLP)": {"batch": 128, "grid": (56, 56), "dim": 256, "gelu": True},
    "k3 1024 px stage 1": {"batch": 8, "grid": (256, 256), "dim": 96, "packed": 3},
    "k3 224 px stage 1, one image": {"batch": 1, "grid": (56, 56), "dim": 96, "packed": 3},
}


def _channels_first(x_BNC: Tensor, grid: tuple[int, ...], weight: Tensor, bias: Tensor | None, **options) -> Tensor:
    """As the authors' codes do it: a contiguous (B, C, H, W) map, conv2d, and back."""
    x_BCHW = x_BNC.unflatten(1, grid[:2]).permute(0, 3, 1, 2).contiguous()
    y = F.conv2d(
        x_BCHW, weight.to(x_BNC.dtype), bias.to(x_BNC.dtype), padding=weight.shape[-1] // 2, groups=len(weight)
    )
    y = F.gelu(y) if options.get("gelu") else y
    return y.flatten(2).transpose(1, 2).contiguous()


OPERATION = Operation(
    name=WHO,
    run=depthwise_conv,
    reference=reference,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _channels_first, "pytorch": reference},
)
