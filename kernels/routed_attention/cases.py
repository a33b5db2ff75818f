"""Inputs, shapes, least work and baselines of routed attention, for the tests and the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import windows
from kernels.operation import Cost, Operation, in_pytorch
from kernels.routed_attention import (
    WHO,
    region_means,
    routed_attention,
    select_regions,
)
from kernels.routed_attention.register import regions_of


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    heads: int,
    region: tuple[int, int],
    topk: int,
    qk_dim: int | None = None,
    lepe: int = 0,
) -> dict:
    """Keyword arguments of `routed_attention`; `lepe` is the side of the convolution.

    Routes are as smooth over the map as those of images: 2x2 neighbours share a random feature and differ by noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    (rows, columns), qk_dim = regions_of(grid, region), qk_dim or dim

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    coarse = random(batch, -(-rows // 2), -(-columns // 2), 32).repeat_interleave(2, 1).repeat_interleave(2, 2)
    q, k = (coarse[:, :rows, :columns] + 0.25 * random(batch, rows, columns, 32) for _ in range(2))
    k = k @ random(32, 32)
    return {
        "qkv_BNC": random(batch, grid[0] * grid[1], 2 * qk_dim + dim, dtype=dtype).requires_grad_(),
        "routes_BRK": (q.flatten(1, 2) @ k.flatten(1, 2).mT).topk(topk, -1).indices,
        "grid": grid,
        "region": region,
        "num_heads": heads,
        "qk_dim": qk_dim,
        "lepe_weight": (random(dim, 1, lepe, lepe) / lepe).requires_grad_() if lepe else None,
        "lepe_bias": random(dim).requires_grad_() if lepe else None,
    }


def cost(
    itemsize: int,
    *,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    region: tuple[int, int],
    topk: int,
    qk_dim: int | None = None,
    lepe: int = 0,
    **_,
) -> Cost:
    """Forward reads q, k, v and writes o; backward reads these four and the gradient, and writes three gradients."""
    tokens, keys, qk_dim = batch * grid[0] * grid[1], topk * region[0] * region[1], qk_dim or dim
    tensors = tokens * (2 * qk_dim + dim) * itemsize
    o, conv_flops = tokens * dim * itemsize, 2 * tokens * dim * lepe**2
    return Cost(
        tensors + o,
        2 * tensors + 2 * o,
        2 * tokens * keys * (qk_dim + dim) + conv_flops,
        2 * tokens * keys * (3 * qk_dim + 2 * dim) + 2 * conv_flops,
    )


CHECKS = {
    "1 of 2 regions of 4x4, LePE": {
        "batch": 2, "grid": (4, 8), "dim": 16, "heads": 1, "region": (4, 4), "topk": 1, "lepe": 3,
    },
    "3 of 6 regions of 4x4": {"batch": 1, "grid": (8, 12), "dim": 32, "heads": 2, "region": (4, 4), "topk": 3},
    "1 of 4 regions of 8x8": {"batch": 1, "grid": (16, 16), "dim": 32, "heads": 1, "region": (8, 8), "topk": 1},
    "4 of 9 regions of 2x2, LePE": {
        "batch": 1, "grid": (6, 6), "dim": 72, "heads": 3, "region": (2, 2), "topk": 4, "lepe": 5,
    },
    "all of 6 regions of 2x3, padded, narrow queries": {
        "batch": 1, "grid": (4, 7), "dim": 96, "heads": 2, "region": (2, 3), "topk": 6, "qk_dim": 32,
    },
    "4 of 35 regions of 1x1": {"batch": 1, "grid": (5, 7), "dim": 32, "heads": 1, "region": (1, 1), "topk": 4},
    "3 of 72 regions of 1x1": {"batch": 1, "grid": (8, 9), "dim": 16, "heads": 1, "region": (1, 1), "topk": 3},
    "2 of 4 regions of 8x8, padded, one head, LePE": {
        "batch": 1, "grid": (9, 13), "dim": 24, "heads": 1, "region": (8, 8), "topk": 2, "lepe": 3,
    },
    "2 of 4 regions of 7x3, padded, wide queries": {
        "batch": 1, "grid": (13, 5), "dim": 32, "heads": 2, "region": (7, 3), "topk": 2, "qk_dim": 64,
    },
}  # fmt: skip


def _stage(batch: int, side: int, dim: int, region: int, topk: int) -> dict:
    return {
        "batch": batch, "grid": (side, side), "dim": dim, "heads": dim // 32, "region": (region, region), "topk": topk,
        "lepe": 5,
    }  # fmt: skip


STAGES = {
    "224 px stage 1 (B)": _stage(128, 56, 96, 8, 1),
    "224 px stage 2 (B)": _stage(128, 28, 192, 4, 4),
    "224 px stage 3 (B)": _stage(128, 14, 384, 2, 16),
    "224 px stage 1 (T, S)": _stage(128, 56, 64, 8, 1),
    "224 px stage 2 (T, S)": _stage(128, 28, 128, 4, 4),
    "224 px stage 3 (T, S)": _stage(128, 14, 256, 2, 16),
    "512 px stage 1, 8x8 regions (B)": _stage(16, 128, 96, 16, 1),
    "512 px stage 2, 8x8 regions (B)": _stage(16, 64, 192, 8, 4),
    "512 px stage 3, 8x8 regions (B)": _stage(16, 32, 384, 4, 16),
    "1024 px stage 1, 16x16 regions (B)": _stage(4, 256, 96, 16, 1),
    "1024 px stage 2, 16x16 regions (B)": _stage(4, 128, 192, 8, 4),
    "1024 px stage 3, 16x16 regions (B)": _stage(4, 64, 384, 4, 16),
    "224 px stage 1, one image (B)": _stage(1, 56, 96, 8, 1),
    "224 px stage 3, one image (B)": _stage(1, 14, 384, 2, 16),
}


def _gathered(qkv_BNC, routes_BRK, grid, region, num_heads, *, qk_dim, scale=None, lepe_weight=None, lepe_bias=None):
    """As the authors' code does it: windows are copied out, and keys gathered out of a tensor expanded R times."""
    B, R, K = routes_BRK.shape
    q_WTC, kv_WTC = (
        windows.split(t, *grid[:2], region) for t in qkv_BNC.split([qk_dim, qkv_BNC.shape[-1] - qk_dim], -1)
    )
    T, width = kv_WTC.shape[1:]
    source = kv_WTC.view(B, 1, R, T, width).expand(-1, R, -1, -1, -1)
    kv = torch.gather(source, 2, routes_BRK.view(B, R, K, 1, 1).expand(-1, -1, -1, T, width))
    k, v = kv.split([qk_dim, width - qk_dim], -1)
    q = q_WTC.unflatten(-1, (num_heads, -1)).transpose(1, 2).contiguous()
    k = k.unflatten(-1, (num_heads, -1)).permute(0, 1, 4, 5, 2, 3).reshape(B * R, num_heads, qk_dim // num_heads, K * T)
    v = v.unflatten(-1, (num_heads, -1)).permute(0, 1, 4, 2, 3, 5).reshape(B * R, num_heads, K * T, -1)
    weights = ((q * (qk_dim**-0.5 if scale is None else scale)) @ k).softmax(-1)
    o_BNC = windows.merge((weights @ v).transpose(1, 2).flatten(2), *grid[:2], region)
    if lepe_weight is None:
        return o_BNC
    v_BCHW = qkv_BNC[..., 2 * qk_dim :].unflatten(1, grid[:2]).permute(0, 3, 1, 2).contiguous()
    parameters = (p.to(v_BCHW.dtype) for p in (lepe_weight, lepe_bias))
    lepe = F.conv2d(v_BCHW, *parameters, padding=lepe_weight.shape[-1] // 2, groups=len(lepe_weight))
    return o_BNC + lepe.flatten(2).transpose(1, 2).contiguous()


def _dense(qkv_BNC, routes_BRK, grid, region, num_heads, *, qk_dim, scale=None, **_):
    """Attention of every token to every token, without routes and LePE."""
    parts = qkv_BNC.split([qk_dim, qk_dim, qkv_BNC.shape[-1] - 2 * qk_dim], -1)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in parts)
    return F.scaled_dot_product_attention(q, k, v, scale=scale or qk_dim**-0.5).transpose(1, 2).flatten(2)


ATTENTION = Operation(
    name=WHO,
    run=routed_attention,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _gathered, "pytorch": in_pytorch(routed_attention), "sdpa": _dense},
)


# Routing as the models have it, but for the projection of the means


def routing(
    x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int], topk: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Means of the regions, and the regions whose means are most alike."""
    means_BRC = region_means(x_BNC, grid, region, backend=backend)
    return means_BRC, select_regions(means_BRC, means_BRC, topk, x_BNC.shape[2] ** -0.5, backend=backend)


def routing_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    region: tuple[int, int],
    topk: int,
    **_,
) -> dict:
    """Keyword arguments of `routing`."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, grid[0] * grid[1], dim, generator=generator, device=device, dtype=dtype)
    return {"x_BNC": x, "grid": grid, "region": region, "topk": topk}


def routing_cost(
    itemsize: int, *, batch: int, grid: tuple[int, int], dim: int, region: tuple[int, int], topk: int, **_
) -> Cost:
    """Reads x, and writes the means in float32."""
    rows, columns = regions_of(grid, region)
    x, means = batch * grid[0] * grid[1] * dim, batch * rows * columns * dim
    return Cost(x * itemsize + 4 * means, 0, x + 2 * means * rows * columns, 0)


ROUTING = Operation(
    name="region_routing",
    run=routing,
    inputs=routing_inputs,
    checks={
        "3 of 6 regions of 4x4, padded": {"batch": 2, "grid": (7, 10), "dim": 32, "region": (4, 4), "topk": 3},
        "1 of 49 regions of 1x1": {"batch": 1, "grid": (7, 7), "dim": 24, "region": (1, 1), "topk": 1},
        "all of 2 regions of 13x9": {"batch": 1, "grid": (13, 12), "dim": 200, "region": (13, 9), "topk": 2},
    },
    stages=STAGES,
    cost=routing_cost,
    baselines={"official": in_pytorch(routing)},
)
OPERATIONS = (ATTENTION, ROUTING)
