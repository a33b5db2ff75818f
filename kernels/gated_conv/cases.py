"""Inputs, shapes, least work and baselines of the gated convolution, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated_conv import WHO, gated_conv
from kernels.operation import Cost, Operation, in_pytorch


def inputs(
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
    """Keyword arguments of `gated_conv`; `dim` = C, half the width of the projection."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "x_BNL": random(batch, sum(grid[2:]) + grid[0] * grid[1], 2 * dim, dtype=dtype).requires_grad_(),
        "grid": grid,
        "weight": (random(dim, 1, kernel, kernel) / kernel).requires_grad_(),
        "bias": random(dim).requires_grad_() if bias else None,
    }


def cost(itemsize: int, *, batch: int, grid: tuple[int, ...], dim: int, kernel: int = 3, **_) -> Cost:
    """Forward reads gate and value and writes y; backward reads both and the gradient and writes those of both."""
    tensor = batch * (sum(grid[2:]) + grid[0] * grid[1]) * dim
    flops = 2 * tensor * kernel**2
    return Cost(3 * tensor * itemsize, 5 * tensor * itemsize, flops, 2 * flops)


CHECKS = {
    "7x7": {"batch": 2, "grid": (7, 7), "dim": 40},
    "one token": {"batch": 1, "grid": (1, 1), "dim": 16},
    "9x7 with prefix, no bias": {"batch": 1, "grid": (9, 7, 2), "dim": 24, "bias": False},
    "7 tokens, 5x5 weights": {"batch": 2, "grid": (1, 7), "dim": 24, "kernel": 5},
    "5x20": {"batch": 2, "grid": (5, 20), "dim": 64},
}
STAGES = {
    "224 px stage 1 (TransNeXt-S)": {"batch": 128, "grid": (56, 56), "dim": 384},
    "224 px stage 2 (TransNeXt-S)": {"batch": 128, "grid": (28, 28), "dim": 768},
    "224 px stage 3 (TransNeXt-S)": {"batch": 128, "grid": (14, 14), "dim": 768},
    "224 px stage 4 (TransNeXt-S)": {"batch": 128, "grid": (7, 7), "dim": 1536},
    "224 px stage 1, one image": {"batch": 1, "grid": (56, 56), "dim": 384},
}


def _channels_first(x_BNL: Tensor, grid: tuple[int, ...], weight: Tensor, bias: Tensor | None, **_) -> Tensor:
    """As the authors' code does it: a contiguous map of the gate, conv2d, back, GELU, and the product."""
    gate, value = x_BNL.chunk(2, dim=-1)
    gate_BCHW = gate.transpose(1, 2).unflatten(2, grid[:2]).contiguous()
    y = F.conv2d(
        gate_BCHW,
        weight.to(gate.dtype),
        None if bias is None else bias.to(gate.dtype),
        padding=weight.shape[-1] // 2,
        groups=len(weight),
    )
    return F.gelu(y.flatten(2).transpose(1, 2)) * value


OPERATION = Operation(
    name=WHO,
    run=gated_conv,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _channels_first, "pytorch": in_pytorch(gated_conv)},
)
