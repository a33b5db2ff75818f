"""Depth-wise convolution of token maps: every channel convolved with its own k×k weights, channels last.

    y = conv(x) + bias;   y = gelu(y) if asked;   y = y + residual if given

x is (B, N, C) with N = prefix + H·W tokens in row-major order and may be strided, e.g. the values inside a projection
(B, N, 3C). Prefix tokens take no part: their output is zero, or the residual. Zero padding, stride 1, odd k.
Everything is accumulated in float32. Used as LePE, position encoding, and value convolution by every mechanism here.

Source: the operation is `torch.nn.functional.conv2d(..., groups=C)`; GELU is the exact one, Hendrycks and Gimpel, 2016,
arXiv:1606.08415.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.depthwise_conv.register import DepthwiseConv
from kernels.dispatch import autocast, check_tensors, is_fused
from kernels.heads import to_map, to_tokens

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
    check(x_BNC, grid, prefix, weight, bias, residual)
    if not is_fused(WHO, backend, x_BNC):
        return definition(x_BNC, grid, weight, bias, residual=residual, gelu=gelu)
    (x_BNC,) = autocast(x_BNC)
    check_tensors(WHO, {"x": x_BNC}, {"weight": weight, "bias": bias, "residual": residual})
    if weight.shape[-1] > LARGEST:
        raise ValueError(
            f"{WHO}: the kernels go up to {LARGEST}x{LARGEST} weights, got {weight.shape[-1]}; use backend=torch"
        )
    return DepthwiseConv.apply(x_BNC, weight, bias, residual, grid[0], grid[1], prefix, gelu)


def definition(
    x_BNC: Tensor,
    grid: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """`gelu(conv(x) + bias) + residual`, the parameters in the dtype of x."""
    prefix = sum(grid[2:])
    parameters = (p if p is None else p.to(x_BNC.dtype) for p in (weight, bias))
    y_BCHW = F.conv2d(to_map(x_BNC, grid), *parameters, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    y_BNC = to_tokens(y_BCHW)
    y_BNC = F.gelu(y_BNC) if gelu else y_BNC
    y_BNC = F.pad(y_BNC, (0, 0, prefix, 0)) if prefix else y_BNC
    return y_BNC if residual is None else y_BNC + residual


def check(
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
