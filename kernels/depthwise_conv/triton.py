"""Triton kernels of `kernels.depthwise_conv`: forward, and the gradients of input, weight and bias, without atomics.

A program computes 4 rows × BX columns × BC channels. Going through the input rows it adds each shifted row to every
output row that sees it, so an output costs k (4 + k - 1) / 4 loads instead of k². Channels are the fast axis of memory:
loads are 128 bits wide, and the shifted ones hit the L1 cache. The rows of one shift are loaded together, which hides
their latency; the shifts are a loop, because the assembler would issue all their loads and run out of registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.conv import four_rows, tile_of_map
from kernels.device.launch import MULTIPROCESSORS, launch, power_of_2, rows


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _finish(
    acc, keep, place, out, out_row, other, other_row, GELU: tl.constexpr, OTHER: tl.constexpr, SLOPE: tl.constexpr
):
    """Stores one row: gelu(acc) + other, or with SLOPE other · gelu'(acc)."""
    if SLOPE:
        acc = _gelu_slope(acc)
    elif GELU:
        acc = _gelu(acc)
    if OTHER:
        more = tl.load(other + place * other_row, mask=keep, other=0.0).to(tl.float32)
        acc = acc * more if SLOPE else acc + more
    tl.store(out + place * out_row, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _convolve(
    x, weight, bias, other, out, H, W, C, x_batch, x_row, out_batch, out_row, other_batch, other_row,
    K: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    OTHER: tl.constexpr, SLOPE: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    image, y, col, c = tile_of_map(H, W, C, BX, BC)
    x += image * x_batch
    live = c < C
    acc0, acc1, acc2, acc3 = four_rows(x, weight, bias, y, col, c, live, H, W, C, x_row, K, BX, BC, BIAS, FLIP)
    inside = (col < W)[:, None] & live[None, :]
    place = y * W + col[:, None]
    out += image * out_batch + c[None, :]
    other += image * other_batch + c[None, :]
    _finish(acc0, inside & (y < H), place, out, out_row, other, other_row, GELU, OTHER, SLOPE)
    _finish(acc1, inside & (y + 1 < H), place + W, out, out_row, other, other_row, GELU, OTHER, SLOPE)
    _finish(acc2, inside & (y + 2 < H), place + 2 * W, out, out_row, other, other_row, GELU, OTHER, SLOPE)
    _finish(acc3, inside & (y + 3 < H), place + 3 * W, out, out_row, other, other_row, GELU, OTHER, SLOPE)


@triton.jit(do_not_specialize=["B", "splits"])
def _correlate(
    grad, x, partial, B, H, W, C, splits, grad_batch, grad_row, x_batch, x_row,
    K: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One row of taps of the weight gradient over a share of the rows of all images; with the first, the bias."""
    dy = tl.program_id(0) % K
    split = tl.program_id(0) // K
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = c < C
    acc0 = tl.zeros([BX, BC], tl.float32)
    acc1 = tl.zeros([BX, BC], tl.float32)
    acc2 = tl.zeros([BX, BC], tl.float32)
    acc3 = tl.zeros([BX, BC], tl.float32)
    acc4 = tl.zeros([BX, BC], tl.float32)
    acc5 = tl.zeros([BX, BC], tl.float32)
    acc6 = tl.zeros([BX, BC], tl.float32)
    total = tl.zeros([BX, BC], tl.float32)
    across = tl.cdiv(W, BX)
    for tile in range(split, B * H * across, splits):
        image = (tile // (across * H)).to(tl.int64)
        y = (tile // across) % H
        col = tile % across * BX + tl.arange(0, BX)
        inside = (col < W)[:, None] & live[None, :]
        g = tl.load(grad + image * grad_batch + (y * W + col[:, None]) * grad_row + c[None, :], mask=inside, other=0.0)
        g = g.to(tl.float32)
        total += g
        row = y + dy - K // 2
        there = (row >= 0) & (row < H)
        for dx in tl.static_range(K):
            seen = col + (dx - K // 2)
            mask = ((seen >= 0) & (seen < W))[:, None] & live[None, :] & there
            value = tl.load(x + image * x_batch + (row * W + seen[:, None]) * x_row + c[None, :], mask=mask, other=0.0)
            product = value.to(tl.float32) * g
            if dx == 0:
                acc0 += product
            elif dx == 1:
                acc1 += product
            elif dx == 2:
                acc2 += product
            elif dx == 3:
                acc3 += product
            elif dx == 4:
                acc4 += product
            elif dx == 5:
                acc5 += product
            else:
                acc6 += product
    # (splits, K·K + 1, C)
    out = partial + (split * (K * K + 1) + dy * K).to(tl.int64) * C + c
    tl.store(out, tl.sum(acc0, 0), mask=live)
    if K > 1:
        tl.store(out + C, tl.sum(acc1, 0), mask=live)
        tl.store(out + 2 * C, tl.sum(acc2, 0), mask=live)
    if K > 3:
        tl.store(out + 3 * C, tl.sum(acc3, 0), mask=live)
        tl.store(out + 4 * C, tl.sum(acc4, 0), mask=live)
    if K > 5:
        tl.store(out + 5 * C, tl.sum(acc5, 0), mask=live)
        tl.store(out + 6 * C, tl.sum(acc6, 0), mask=live)
    if dy == 0:
        tl.store(partial + (split * (K * K + 1) + K * K).to(tl.int64) * C + c, tl.sum(total, 0), mask=live)


def tiles(width: int, channels: int) -> tuple[int, int]:
    """Columns and channels of a program: 1024 elements, so that a thread holds 8 channels, and 4 rows of them."""
    columns = min(32, power_of_2(width, least=4))
    return columns, min(1024 // columns, power_of_2(channels))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    grid: tuple[int, int, int],
    *,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """Writes into `out`, which may be the residual itself: that adds in place."""
    _convolve_into(out, x, weight, bias, grid, other=residual, gelu=gelu)
    if grid[2] and residual is not out:
        out[:, : grid[2]] = 0 if residual is None else residual[:, : grid[2]]
    return out


def input_gradient(
    grad: Tensor, weight: Tensor, out: Tensor, grid: tuple[int, int, int], *, add: bool = False
) -> Tensor:
    """The gradient of x (without GELU) into `out`, or on top of what is there."""
    _convolve_into(out, grad, weight, None, grid, other=out if add else None, flip=True)
    if grid[2] and not add:
        out[:, : grid[2]] = 0
    return out


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The gradients (C, 1, k, k) and (C,) in float32, summed in a fixed order."""
    (B, _, C), (H, W, prefix), K = x.shape, grid, weight.shape[-1]
    grad, x = rows(grad)[:, prefix:], rows(x)[:, prefix:]
    BX, BC = tiles(W, C)
    blocks = triton.cdiv(C, BC)
    # about eight programs per multiprocessor, each with at least 8 tiles of work
    splits = max(1, min(triton.cdiv(8 * MULTIPROCESSORS, blocks * K), triton.cdiv(B * H * triton.cdiv(W, BX), 8)))
    partial = torch.empty(splits, K * K + 1, C, dtype=torch.float32, device=x.device)
    launch(
        _correlate, (splits * K, blocks), grad, x, partial, B, H, W, C, splits,
        grad.stride(0), grad.stride(1), x.stride(0), x.stride(1), K=K, BX=BX, BC=BC,
    )  # fmt: skip
    total = partial.sum(0)
    return total[:-1].t().reshape(C, 1, K, K).contiguous(), total[-1].clone()


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int, int], *, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    grad = rows(grad)
    if gelu:
        before = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _convolve_into(before, x, weight, bias, grid, other=grad, slope=True)
        grad = before
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    input_gradient(grad, weight, dx, grid)
    dweight, dbias = weight_gradient(grad, x, weight, grid)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _convolve_into(out, x, weight, bias, grid, *, other=None, gelu=False, slope=False, flip=False) -> None:
    (B, _, C), (H, W, prefix), K = x.shape, grid, weight.shape[-1]
    x, out = rows(x)[:, prefix:], out[:, prefix:]
    other = out if other is None else rows(other)[:, prefix:] if other.shape[1] != out.shape[1] else rows(other)
    has_other = slope or other is not out
    taps = weight.reshape(C, K * K).t().contiguous()
    BX, BC = tiles(W, C)
    launch(
        _convolve, (B * triton.cdiv(H, 4) * triton.cdiv(W, BX), triton.cdiv(C, BC)),
        x, taps, bias, other, out, H, W, C, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        other.stride(0), other.stride(1),
        K=K, BX=BX, BC=BC, BIAS=bias is not None, GELU=gelu, OTHER=has_other, SLOPE=slope,
        FLIP=flip,
    )  # fmt: skip
