"""Inputs, shapes, least work and baselines of linear attention, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.depthwise_conv import depthwise_conv
from kernels.heads import merge_heads, split_heads
from kernels.linear_attention import EPS, FOCUSED, INLINE, focused_linear_attention, inline_attention
from kernels.linear_attention.register import flops_of
from kernels.operation import Cost, Operation, in_pytorch


def _random(device: str | torch.device, seed: int):
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return (values * factor).requires_grad_()

    return random


def _tokens(grid: tuple[int, ...]) -> int:
    return sum(grid[2:]) + grid[0] * grid[1]


def focused_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    heads: int,
    dim: int,
    power: float = 3.0,
    kernel: int = 5,
    position: bool = True,
    lepe: bool = False,
    learned: bool = True,
) -> dict:
    """Keyword arguments of `focused_linear_attention`; `dim` = C, kernel 0 is no convolution.

    With one token the result hardly depends on scale and position: no gradients of them where `learned` is false.
    """
    random, N = _random(device, seed), _tokens(grid)
    return {
        "qkv_BNC": random(batch, N, 3 * dim, dtype=dtype),
        "grid": grid,
        "num_heads": heads,
        "power": power,
        "scale_C": F.softplus(random(dim).detach()).requires_grad_(learned),
        "position_NC": random(N, dim, factor=0.5).requires_grad_(learned) if position else None,
        "weight": random(dim // heads, 1, kernel, kernel, factor=0.2) if kernel else None,
        "bias": random(dim // heads) if kernel else None,
        "lepe_weight": random(dim, 1, 3, 3, factor=0.2) if lepe else None,
        "lepe_bias": random(dim) if lepe else None,
    }


def inline_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    heads: int,
    dim: int,
    kernel: int = 3,
) -> dict:
    """Keyword arguments of `inline_attention`; kernel 0 is no convolution."""
    random = _random(device, seed)
    return {
        "qkv_BNC": random(batch, _tokens(grid), 3 * dim, dtype=dtype),
        "grid": grid,
        "num_heads": heads,
        "dynamic_weight_BC33": random(batch, dim, 3, 3, dtype=dtype, factor=0.3) if kernel else None,
    }


def _cost(default_kernel: int):
    """Forward reads q, k, v and writes o; backward reads those three and the gradient and writes three."""

    def cost(
        itemsize: int,
        *,
        batch: int,
        grid: tuple[int, ...],
        heads: int,
        dim: int,
        kernel: int = default_kernel,
        lepe: bool = False,
        **_,
    ) -> Cost:
        tensor = batch * _tokens(grid) * dim * itemsize
        flops = flops_of(batch, _tokens(grid), dim, heads, grid[0] * grid[1], max(kernel, 3 if lepe else 0))
        return Cost(4 * tensor, 7 * tensor, flops, 2 * flops)

    return cost


_SWIN = {"batch": 128, "heads": 3, "dim": 96}
_SWIN_2 = {"batch": 128, "heads": 6, "dim": 192}
CHECKS = {
    "7x7": {"batch": 2, "grid": (7, 7), "heads": 2, "dim": 32, "kernel": 3},
    "one token, power 1": {"batch": 1, "grid": (1, 1), "heads": 1, "dim": 16, "power": 1.0, "learned": False},
    "7 tokens, head width 24, no convolution": {"batch": 2, "grid": (1, 7), "heads": 3, "dim": 72, "kernel": 0},
    "9x7, prefix, head width 72, lepe": {
        "batch": 1, "grid": (9, 7, 1), "heads": 2, "dim": 144, "kernel": 3, "lepe": True,
    },
    "5x20, power 4.5, head width 16, lepe": {
        "batch": 1, "grid": (5, 20), "heads": 3, "dim": 48, "power": 4.5, "lepe": True,
    },
    "13 tokens, power 8, no position, lepe alone": {
        "batch": 2, "grid": (13, 1), "heads": 2, "dim": 192, "power": 8.0, "position": False, "kernel": 0, "lepe": True,
    },
    "10x10, head width 64": {"batch": 1, "grid": (10, 10), "heads": 1, "dim": 64, "kernel": 3},
}  # fmt: skip
STAGES = {
    "FLatten-Swin 224 px stage 1": _SWIN | {"grid": (56, 56)},
    "FLatten-Swin 224 px stage 2": _SWIN_2 | {"grid": (28, 28)},
    "FLatten-PVT 224 px stage 1": {"batch": 128, "grid": (56, 56), "heads": 1, "dim": 64},
    "FLatten-PVT 224 px stage 2": {"batch": 128, "grid": (28, 28), "heads": 2, "dim": 128},
    "FLatten-PVT 224 px stage 3": {"batch": 128, "grid": (14, 14), "heads": 5, "dim": 320},
    "FLatten-PVT 224 px stage 4": {"batch": 128, "grid": (7, 7), "heads": 8, "dim": 512},
    "FLatten-CSWin 224 px stage 1": {"batch": 128, "grid": (56, 56), "heads": 2, "dim": 64, "lepe": True},
    "FLatten-Swin 1024 px stage 1": {"batch": 8, "grid": (256, 256), "heads": 3, "dim": 96},
    "FLatten-PVT 1024 px stage 3": {"batch": 8, "grid": (64, 64), "heads": 5, "dim": 320},
    "FLatten-Swin 224 px stage 1, one image": {"batch": 1, "grid": (56, 56), "heads": 3, "dim": 96},
}
INLINE_CHECKS = {
    "7x7": {"batch": 2, "grid": (7, 7), "heads": 2, "dim": 32},
    "one token": {"batch": 1, "grid": (1, 1), "heads": 1, "dim": 16},
    "9x7, prefix, head width 24": {"batch": 2, "grid": (9, 7, 1), "heads": 3, "dim": 72},
    "10x10, head width 48": {"batch": 1, "grid": (10, 10), "heads": 1, "dim": 48},
    "13 tokens, head width 96, no convolution": {"batch": 2, "grid": (13, 1), "heads": 1, "dim": 96, "kernel": 0},
}
INLINE_STAGES = {
    "InLine-Swin 224 px stage 1": _SWIN | {"grid": (56, 56)},
    "InLine-Swin 224 px stage 2": _SWIN_2 | {"grid": (28, 28)},
    "InLine-Swin 224 px stage 3": {"batch": 128, "grid": (14, 14), "heads": 12, "dim": 384},
    "InLine-PVT 224 px stage 4": {"batch": 128, "grid": (7, 7), "heads": 16, "dim": 512},
    "InLine-DeiT-T 224 px": {"batch": 128, "grid": (14, 14, 1), "heads": 6, "dim": 192},
    "InLine-Swin 1024 px stage 1": {"batch": 8, "grid": (256, 256), "heads": 3, "dim": 96},
    "InLine-Swin 224 px stage 1, one image": {"batch": 1, "grid": (56, 56), "heads": 3, "dim": 96},
}


def _official_focused(
    qkv_BNC: Tensor, grid: tuple[int, ...], num_heads: int, *, power: float, scale_C: Tensor, position_NC, weight, bias,
    lepe_weight, lepe_bias,
) -> Tensor:  # fmt: skip
    """As the authors' code does it: features in the activations' dtype, heads copied apart, maps channels first."""
    dtype, (B, N, _) = qkv_BNC.dtype, qkv_BNC.shape
    q, k, v = qkv_BNC.chunk(3, -1)
    k = k if position_NC is None else k + position_NC.to(dtype)
    q, k = ((F.relu(x) + EPS) / scale_C.to(dtype) for x in (q, k))
    lengths = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
    q, k = q**power, k**power
    q, k = (x / x.norm(dim=-1, keepdim=True) * length for x, length in zip((q, k), lengths, strict=True))
    q, k, v = (split_heads(x, 1, num_heads)[0].contiguous() for x in (q, k, v))
    z = 1 / (q @ k.mean(2, keepdim=True).mT + EPS)
    o_BNC = merge_heads(q @ ((k.mT * N**-0.5) @ (v * N**-0.5)) * z)
    height, width, prefix = (*grid, 0)[:3]
    if weight is not None:
        v_map = v[:, :, prefix:].mT.reshape(B * num_heads, -1, height, width)
        local = F.conv2d(v_map, weight.to(dtype), bias.to(dtype), padding=weight.shape[-1] // 2, groups=len(weight))
        o_BNC = o_BNC + F.pad(local.reshape(B, -1, height * width).mT, (0, 0, prefix, 0))
    if lepe_weight is None:
        return o_BNC
    return o_BNC + depthwise_conv(qkv_BNC.chunk(3, -1)[2], grid, lepe_weight, lepe_bias, backend="torch")


def _official_inline(qkv_BNC: Tensor, grid: tuple[int, ...], num_heads: int, *, dynamic_weight_BC33) -> Tensor:
    """As the authors' code does it: `q kv + (1 - q·mean k) mean v`, and B·C groups of a contiguous map."""
    B, N, C = qkv_BNC.shape[0], qkv_BNC.shape[1], qkv_BNC.shape[2] // 3
    height, width, prefix = (*grid, 0)[:3]
    q, k, v = split_heads(qkv_BNC, 3, num_heads)
    scale = q.shape[3] ** -0.5
    state = (k.mT * (scale / N) ** 0.5) @ (v * (scale / N) ** 0.5)
    rest = 1 - q @ k.mean(2, keepdim=True).mT * scale
    o_BNC = merge_heads(q @ state + rest * v.mean(2, keepdim=True))
    if dynamic_weight_BC33 is None:
        return o_BNC
    v_map = v.transpose(1, 2).reshape(B, N, C)[:, prefix:].mT.reshape(1, B * C, height, width)
    local = F.conv2d(v_map, dynamic_weight_BC33.to(v.dtype).view(-1, 1, 3, 3), padding=1, groups=B * C)
    return o_BNC + F.pad(local.view(B, C, -1).mT, (0, 0, prefix, 0))


def _sdpa(qkv_BNC: Tensor, grid: tuple[int, ...], num_heads: int, **_) -> Tensor:
    return merge_heads(F.scaled_dot_product_attention(*split_heads(qkv_BNC, 3, num_heads)))


OPERATION = Operation(
    name=FOCUSED,
    run=focused_linear_attention,
    inputs=focused_inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=_cost(5),
    baselines={"official": _official_focused, "pytorch": in_pytorch(focused_linear_attention), "sdpa": _sdpa},
)
INLINE_OPERATION = Operation(
    name=INLINE,
    run=inline_attention,
    inputs=inline_inputs,
    checks=INLINE_CHECKS,
    stages=INLINE_STAGES,
    cost=_cost(3),
    baselines={"official": _official_inline, "pytorch": in_pytorch(inline_attention), "sdpa": _sdpa},
)
OPERATIONS = (OPERATION, INLINE_OPERATION)
