"""Inputs, shapes, least work and baselines of layer norm, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layer_norm import (
    WHO,
    conv_norm,
    normalised,
)
from kernels.operation import Cost, Operation, in_pytorch


def conv_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    dim: int,
    kernel: int = 3,
    bias: bool = True,
) -> dict:
    """Keyword arguments of `conv_norm`; parameters are float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "x_BNC": random(batch, sum(grid[2:]) + grid[0] * grid[1], dim, dtype=dtype).requires_grad_(),
        "grid": grid,
        "conv_weight": (random(dim, 1, kernel, kernel) / kernel).requires_grad_(),
        "conv_bias": random(dim).requires_grad_() if bias else None,
        "norm_weight": random(dim).requires_grad_(),
        "norm_bias": random(dim).requires_grad_(),
    }


def conv_cost(itemsize: int, *, batch: int, grid: tuple[int, ...], dim: int, kernel: int = 3, **_) -> Cost:
    """Forward reads x and writes y and n; backward reads x, y and their gradients and writes that of x."""
    tensor = batch * (sum(grid[2:]) + grid[0] * grid[1]) * dim
    flops = 2 * batch * grid[0] * grid[1] * dim * kernel**2
    return Cost(3 * tensor * itemsize, 5 * tensor * itemsize, flops, 2 * flops)


CONV_CHECKS = {
    "7x7": {"batch": 1, "grid": (7, 7), "dim": 72},
    "one token": {"batch": 1, "grid": (1, 1), "dim": 16},
    "9x7 with prefix, wide": {"batch": 1, "grid": (9, 7, 2), "dim": 24, "kernel": 5},
    "5x20, no bias": {"batch": 1, "grid": (5, 20), "dim": 96, "bias": False},
    "13 tokens, 7x7 weights": {"batch": 1, "grid": (1, 13), "dim": 48, "kernel": 7},
    "3x3, many channels": {"batch": 1, "grid": (3, 3), "dim": 600},
}
CONV_STAGES = {
    "224 px stage 1 (DaViT-B)": {"batch": 128, "grid": (56, 56), "dim": 128},
    "224 px stage 2 (DaViT-B)": {"batch": 128, "grid": (28, 28), "dim": 256},
    "224 px stage 3 (DaViT-B)": {"batch": 128, "grid": (14, 14), "dim": 512},
    "224 px stage 4 (DaViT-B)": {"batch": 128, "grid": (7, 7), "dim": 1024},
    "224 px stage 1 (BiFormer-B)": {"batch": 128, "grid": (56, 56), "dim": 96},
    "224 px stage 3 (BiFormer-B)": {"batch": 128, "grid": (14, 14), "dim": 384},
    "1024 px stage 1": {"batch": 8, "grid": (256, 256), "dim": 128},
    "224 px stage 3, one image": {"batch": 1, "grid": (14, 14), "dim": 512},
}


def _channels_first(x_BNC: Tensor, grid: tuple[int, ...], conv_weight, conv_bias, norm_weight, norm_bias, eps=1e-6):
    """As the authors' codes do it: a contiguous (B, C, H, W) map, conv2d, back, add, and the norm."""
    x_BCHW = x_BNC.transpose(1, 2).unflatten(2, grid[:2]).contiguous()
    bias = None if conv_bias is None else conv_bias.to(x_BNC.dtype)
    conv = F.conv2d(
        x_BCHW, conv_weight.to(x_BNC.dtype), bias, padding=conv_weight.shape[-1] // 2, groups=x_BNC.shape[2]
    )
    y_BNC = x_BNC + conv.flatten(2).transpose(1, 2)
    return y_BNC, normalised(y_BNC, norm_weight, norm_bias, eps)


OPERATION = Operation(
    name=WHO,
    run=conv_norm,
    inputs=conv_inputs,
    checks=CONV_CHECKS,
    stages=CONV_STAGES,
    cost=conv_cost,
    baselines={"official": _channels_first, "pytorch": in_pytorch(conv_norm)},
)
