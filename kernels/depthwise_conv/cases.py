"""Inputs, shapes, least work and baselines of depth-wise convolution, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.depthwise_conv import WHO, depthwise_conv
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
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _channels_first, "pytorch": in_pytorch(depthwise_conv)},
)
