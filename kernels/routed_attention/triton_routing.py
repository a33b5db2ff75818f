"""Routing of `kernels.routed_attention`: the mean token of each region, and the regions that are most alike."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.launch import launch, power_of_2, rows


@triton.jit
def _means(
    x, out, H, W, C, R, x_batch, x_row, GW, h: tl.constexpr, w: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    image = (tl.program_id(0) // R).to(tl.int64)
    region = tl.program_id(0) % R
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = c < C
    top = region // GW * h
    left = region % GW * w
    x += image * x_batch
    total = tl.zeros([BT, BC], tl.float32)
    for start in range(0, h * w, BT):
        cell = start + tl.arange(0, BT)
        y = top + cell // w
        column = left + cell % w
        keep = (cell < h * w) & (y < H) & (column < W)
        value = tl.load(
            x + (y * W + column)[:, None] * x_row + c[None, :], mask=keep[:, None] & live[None, :], other=0.0
        )
        total += value.to(tl.float32)
    cells = tl.minimum(h, H - top) * tl.minimum(w, W - left)
    tl.store(out + (image * R + region) * C + c, tl.sum(total, 0) / cells.to(tl.float32), mask=live)


@triton.jit
def _select(q, k, routes, R, C, K, scale, BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The K best of each row of the affinity; a row stays in registers."""
    tiles = tl.cdiv(R, BM)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    column = tl.arange(0, BR)
    q += image * R * C
    k += image * R * C
    affinity = tl.zeros([BM, BR], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        live = c < C
        left = tl.load(q + row[:, None] * C + c[None, :], mask=(row < R)[:, None] & live[None, :], other=0.0)
        right = tl.load(k + column[None, :] * C + c[:, None], mask=live[:, None] & (column < R)[None, :], other=0.0)
        affinity += tl.dot(left.to(tl.float32) * scale, right.to(tl.float32), input_precision="ieee")
    # ordered as integers; NaN counts as the largest, as in torch.sort, and the lowest integer is none of them
    affinity = tl.where(affinity == affinity, affinity, float("inf"))
    bits = tl.where(affinity == 0, 0.0, affinity).to(tl.int32, bitcast=True)
    lowest = tl.full([BM, BR], -(2**31), tl.int32)
    ordered = tl.where((column < R)[None, :], tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), lowest)
    for i in range(K):
        highest = tl.max(ordered, 1)
        best = tl.min(tl.where(ordered == highest[:, None], column[None, :], BR), 1)
        tl.store(routes + (image * R + row) * K + i, best.to(tl.int64), mask=row < R)
        ordered = tl.where(column[None, :] == best[:, None], lowest, ordered)


def region_means(x: Tensor, grid: tuple[int, int], region: tuple[int, int]) -> Tensor:
    """(B, R, C) in float32."""
    (B, _, C), (H, W), (h, w) = x.shape, grid, region
    x, GW = rows(x), triton.cdiv(W, w)
    R = triton.cdiv(H, h) * GW
    out = torch.empty(B, R, C, dtype=torch.float32, device=x.device)
    BC = min(128, power_of_2(C))
    BT = min(2048 // BC, power_of_2(h * w, least=1))
    warps = max(1, min(4, BT * BC // 512))  # with 16 elements of a thread: two loads of 16 bytes
    launch(
        _means, (B * R, triton.cdiv(C, BC)), x, out, H, W, C, R, x.stride(0), x.stride(1), GW,
        h=h, w=w, BT=BT, BC=BC, warps=warps,
    )  # fmt: skip
    return out


def select_regions(q: Tensor, k: Tensor, topk: int, scale: float) -> Tensor:
    """(B, R, topk), best first."""
    B, R, C = q.shape
    routes = torch.empty(B, R, topk, dtype=torch.int64, device=q.device)
    BR = power_of_2(R)
    launch(
        _select, (B * triton.cdiv(R, 16),), q.contiguous(), k.contiguous(), routes, R, C, topk, scale,
        BM=16, BR=BR, BC=16, warps=max(4, BR // 64),
    )  # fmt: skip
    return routes
