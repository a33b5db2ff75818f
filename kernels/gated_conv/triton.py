"""Launches of `kernels.gated_conv`: the kernels are those of `kernels.depthwise_conv`, which gate instead of adding."""

import torch
from torch import Tensor

from kernels.depthwise_conv.triton import convolve_into
from kernels.depthwise_conv.triton_backward import gradients
from kernels.device.launch import rows


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int, int]) -> Tensor:
    gate, value = _halves(x)
    out = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
    convolve_into(out, gate, weight, bias, grid, other=value, gelu=True, gated=True)
    if grid[2]:
        out[:, : grid[2]] = 0
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias: that of the value and of what GELU had, in one pass, then as without a gate."""
    (gate, value), grad = _halves(x), rows(grad)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate, dvalue = _halves(dx)
    before = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
    convolve_into(before, gate, weight, bias, grid, other=grad, slope=True, gated=True, value=value, twin=dvalue)
    dweight, dbias = gradients(before, gate, weight, dgate, grid)
    if grid[2]:
        dvalue[:, : grid[2]] = 0
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """Gate and value."""
    return rows(x).chunk(2, dim=-1)
