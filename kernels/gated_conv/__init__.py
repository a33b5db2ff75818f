"""Convolutional gated linear unit: a depth-wise convolution and GELU of one half of a projection gate the other half.

    y = gelu(conv(gate) + bias) · value

x is (B, N, 2C), gate and value, with N = prefix + H·W tokens in row-major order; y is (B, N, C). Prefix tokens take no
part: their output is zero. Zero padding, stride 1, odd k; accumulated in float32. Forward reads x once and writes y;
kept for backward is x alone, and the gradients of both halves are written where that of the projection has them.

Source: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, section 3.4.
"""

from torch import Tensor

from kernels import depthwise_conv
from kernels.dispatch import autocast, check_tensors, is_fused
from kernels.gated_conv.register import convolve_and_gate

WHO = "gated_conv"


def gated_conv(
    x_BNL: Tensor, grid: tuple[int, ...], weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """`gelu(conv(gate) + bias) · value`, (B, N, C) in the dtype of x, or autocast's.

    Args:
        x_BNL: a packed projection, L = 2C: gate, then value; prefix first.
        grid: (height, width) or (height, width, prefix).
        weight: (C, 1, k, k) as in `nn.Conv2d`, k odd.
        bias: (C,), or None.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a kernel side above 7 on the fused path.
    """
    _check(x_BNL, grid, weight, bias)
    if not is_fused(WHO, backend, x_BNL):
        return definition(x_BNL, grid, weight, bias)
    (x_BNL,) = autocast(x_BNL)
    check_tensors(WHO, {"x": x_BNL}, {"weight": weight, "bias": bias})
    if weight.shape[-1] > depthwise_conv.LARGEST:
        side = depthwise_conv.LARGEST
        raise ValueError(
            f"{WHO}: the kernels go up to {side}x{side} weights, got {weight.shape[-1]}; use backend=torch"
        )
    return convolve_and_gate(x_BNL, weight, bias, grid[0], grid[1], sum(grid[2:]))


def definition(x_BNL: Tensor, grid: tuple[int, ...], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu(conv(gate) + bias) · value`, the parameters in the dtype of x."""
    gate_BNC, value_BNC = x_BNL.chunk(2, dim=-1)
    return depthwise_conv.definition(gate_BNC, grid, weight, bias, gelu=True) * value_BNC


def _check(x: Tensor, grid: tuple[int, ...], weight: Tensor, bias: Tensor | None) -> None:
    prefix, (C, k) = sum(grid[2:]), (weight.shape[0], weight.shape[-1])
    if tuple(weight.shape) != (C, 1, k, k) or k % 2 == 0:
        raise ValueError(f"{WHO}: weight must be (C, 1, k, k) with odd k, got {tuple(weight.shape)}; see nn.Conv2d")
    if x.dim() != 3 or x.shape[1:] != (prefix + grid[0] * grid[1], 2 * C):
        raise ValueError(
            f"{WHO}: x must be (B, {prefix} + {grid[0]}*{grid[1]}, 2*{C}), got {tuple(x.shape)}; pass gate and value "
            "of this map, packed"
        )
    if bias is not None and tuple(bias.shape) != (C,):
        raise ValueError(f"{WHO}: bias must be ({C},), got {tuple(bias.shape)}; give one number per channel")
