"""Inputs, shapes, least work and baselines of agent attention, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.agent_attention import WHO, agent_attention
from kernels.operation import Cost, Operation, in_pytorch


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    dim: int,
    heads: int,
    agents: tuple[int, int],
    tables: bool = True,
    kernel: int = 3,
) -> dict:
    """Keyword arguments of `agent_attention`; kernel 0 for no convolution."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, count = sum(grid[2:]) + grid[0] * grid[1], agents[0] * agents[1]

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "qkv_BNC": random(batch, tokens, 3 * dim, dtype=dtype).requires_grad_(),
        "grid": grid,
        "num_heads": heads,
        "agents": agents,
        "gather_bias_MAN": random(heads, count, tokens).requires_grad_() if tables else None,
        "scatter_bias_MNA": random(heads, tokens, count).requires_grad_() if tables else None,
        "weight": (random(dim, 1, kernel, kernel) / kernel).requires_grad_() if kernel else None,
        "bias": random(dim).requires_grad_() if kernel else None,
    }


def cost(
    itemsize: int,
    *,
    batch: int,
    grid: tuple[int, ...],
    dim: int,
    heads: int,
    agents: tuple[int, int],
    tables: bool = True,
    kernel: int = 3,
) -> Cost:
    """Forward reads q, k, v and writes o; backward reads q, k, v and the gradient and writes three more.

    The tables are read once by each pass and their gradients written once, in float32.
    """
    tokens, count = sum(grid[2:]) + grid[0] * grid[1], agents[0] * agents[1]
    tensor, table = batch * tokens * dim * itemsize, 2 * 4 * heads * count * tokens * tables
    flops = batch * dim * (8 * tokens * count + 2 * grid[0] * grid[1] * kernel**2)
    return Cost(4 * tensor + table, 7 * tensor + 2 * table, flops, 2 * flops)


CHECKS = {
    "7x6, prefix": {"batch": 2, "grid": (7, 6, 1), "dim": 32, "heads": 2, "agents": (3, 3)},
    "one token": {"batch": 1, "grid": (1, 1), "dim": 16, "heads": 1, "agents": (1, 1)},
    "7 tokens, no tables": {
        "batch": 2, "grid": (1, 7), "dim": 48, "heads": 2, "agents": (1, 3), "tables": False, "kernel": 5,
    },
    "7x7, as many agents": {"batch": 1, "grid": (7, 7), "dim": 72, "heads": 1, "agents": (7, 7)},
    "9x7, prefix": {"batch": 3, "grid": (9, 7, 1), "dim": 32, "heads": 1, "agents": (3, 3)},
    "7x5, overlapping bins, no convolution": {
        "batch": 2, "grid": (7, 5), "dim": 96, "heads": 1, "agents": (3, 3), "kernel": 0,
    },
    "10x10, prefix, 81 agents": {"batch": 1, "grid": (10, 10, 1), "dim": 64, "heads": 1, "agents": (9, 9)},
    "10x9, overlapping bins": {"batch": 1, "grid": (10, 9), "dim": 48, "heads": 1, "agents": (7, 7), "kernel": 5},
    "16x17, split over tokens": {"batch": 1, "grid": (16, 17), "dim": 32, "heads": 1, "agents": (3, 4)},
}  # fmt: skip
STAGES = {
    "Swin-T 224 px stage 1": {"batch": 128, "grid": (56, 56), "dim": 96, "heads": 3, "agents": (3, 3)},
    "Swin-T 224 px stage 2": {"batch": 128, "grid": (28, 28), "dim": 192, "heads": 6, "agents": (4, 4)},
    "Swin-T 224 px stage 3": {"batch": 128, "grid": (14, 14), "dim": 384, "heads": 12, "agents": (7, 7)},
    "PVT 224 px stage 1": {"batch": 128, "grid": (56, 56), "dim": 64, "heads": 1, "agents": (3, 3)},
    "PVT 224 px stage 2": {"batch": 128, "grid": (28, 28), "dim": 128, "heads": 2, "agents": (4, 4)},
    "PVT 224 px stage 3": {"batch": 128, "grid": (14, 14), "dim": 320, "heads": 5, "agents": (7, 7)},
    "PVT 224 px stage 4": {"batch": 128, "grid": (7, 7), "dim": 512, "heads": 8, "agents": (7, 7)},
    "DeiT-T 224 px": {"batch": 128, "grid": (14, 14, 1), "dim": 192, "heads": 3, "agents": (7, 7)},
    "DeiT-S 224 px": {"batch": 128, "grid": (14, 14, 1), "dim": 384, "heads": 6, "agents": (7, 7)},
    "DeiT-B 224 px": {"batch": 128, "grid": (14, 14, 1), "dim": 768, "heads": 12, "agents": (9, 9)},
    "DeiT-S 448 px": {"batch": 32, "grid": (28, 28, 1), "dim": 384, "heads": 6, "agents": (7, 7)},
    "Swin-T 512 px stage 1": {"batch": 32, "grid": (128, 128), "dim": 96, "heads": 3, "agents": (3, 3)},
    "Swin-T 512 px stage 3": {"batch": 32, "grid": (32, 32), "dim": 384, "heads": 12, "agents": (7, 7)},
    "Swin-T 1024 px stage 1": {"batch": 8, "grid": (256, 256), "dim": 96, "heads": 3, "agents": (3, 3)},
    "Swin-T 1024 px stage 3": {"batch": 8, "grid": (64, 64), "dim": 384, "heads": 12, "agents": (7, 7)},
    "Swin-T 224 px stage 1, one image": {"batch": 1, "grid": (56, 56), "dim": 96, "heads": 3, "agents": (3, 3)},
    "Swin-T 224 px stage 3, one image": {"batch": 1, "grid": (14, 14), "dim": 384, "heads": 12, "agents": (7, 7)},
}


def _official(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    agents: tuple[int, int],
    *,
    gather_bias_MAN: Tensor | None = None,
    scatter_bias_MNA: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """As the authors' code does it: the scores in memory, the maps of q and v copied to channels first."""
    (B, N, C3), (H, W, prefix), dtype = qkv_BNC.shape, (*grid, 0)[:3], qkv_BNC.dtype
    C = C3 // 3
    scale = (C // num_heads) ** -0.5 if scale is None else scale
    q, k, v = qkv_BNC.reshape(B, N, 3, C).permute(2, 0, 1, 3)
    pooled = F.adaptive_avg_pool2d(q[:, prefix:].reshape(B, H, W, C).permute(0, 3, 1, 2), agents).reshape(B, C, -1)
    a = pooled.permute(0, 2, 1).reshape(B, -1, num_heads, C // num_heads).permute(0, 2, 1, 3)
    q, k, v = (t.reshape(B, N, num_heads, C // num_heads).permute(0, 2, 1, 3) for t in (q, k, v))
    to_agents = (a * scale) @ k.transpose(-2, -1)
    to_agents = (to_agents if gather_bias_MAN is None else to_agents + gather_bias_MAN.to(dtype)).softmax(-1)
    to_tokens = (q * scale) @ a.transpose(-2, -1)
    to_tokens = (to_tokens if scatter_bias_MNA is None else to_tokens + scatter_bias_MNA.to(dtype)).softmax(-1)
    x = (to_tokens @ (to_agents @ v)).transpose(1, 2).reshape(B, N, C)
    if weight is None:
        return x
    v_BCHW = v.transpose(1, 2).reshape(B, N, C)[:, prefix:].reshape(B, H, W, C).permute(0, 3, 1, 2).contiguous()
    parameters = (p if p is None else p.to(dtype) for p in (weight, bias))
    local = F.conv2d(v_BCHW, *parameters, padding=weight.shape[-1] // 2, groups=C).permute(0, 2, 3, 1).reshape(B, -1, C)
    return torch.cat([x[:, :prefix], x[:, prefix:] + local], 1)


def _dense(qkv_BNC: Tensor, grid: tuple[int, ...], num_heads: int, agents: tuple[int, int], **_) -> Tensor:
    """Softmax attention of all tokens on all tokens."""
    q, k, v = qkv_BNC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OPERATION = Operation(
    name=WHO,
    run=agent_attention,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _official, "pytorch": in_pytorch(agent_attention), "sdpa": _dense},
)
