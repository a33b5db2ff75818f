"""Gradients of `kernels.depthwise_conv`: of input, weight and bias in one pass, without atomics.

As forward a program goes down BX columns × BC channels. With a row of the gradient, shifted K times, it has what the
gradient of the input needs, and with K rows of the input in registers what K·K sums for the weights need: a column of a
thread has a sum for each of them, over all its images. They are added across columns at the very end, and across
programs, in a fixed order, afterwards. What columns beyond the map added is not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise_conv.triton import SIZES, Plan, convolve_into, taps_table
from kernels.device.conv import columns_seen, load_shifted, repeated, taps_of, widened, within
from kernels.device.launch import MULTIPROCESSORS, launch, partial_sums, rows

WIDEST_IN_ONE = 5  # 7×7 weights and as many sums do not fit in the registers of a thread together


@triton.jit
def _turn(
    acc, line, sums, total, taps, row, last, top, count, grad, at, seen, inside, x, x_at, other, other_at, dx, dx_at,
    W, x_row, other_row, dx_row,
    K: tl.constexpr, ROW: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr,
    INPUT: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Goes on by K rows of the gradient. `line` has the K - 1 rows of x around the first that are above its lowest.

    `sums` are those of a column of taps next to each other.
    """
    zero = tl.zeros_like(total)
    for k in tl.static_range(K):
        if k % AHEAD == 0:
            read, entering, more = (), (), ()
            for n in tl.static_range(k, min(k + AHEAD, K)):
                read = read + load_shifted(grad, row + n, W, at, seen, row + n < last, K, ROW, n > 0)
                y = row + n + K // 2
                place = x + y * W * x_row + x_at
                entering += (tl.load(place, mask=inside & within(y, top, count), other=0.0),)
                y = row + n - K // 2
                if OTHER:
                    place = other + y * W * other_row + other_at
                    more += (tl.load(place, mask=inside & within(y, top, count), other=0.0),)
        line += (widened(entering[k % AHEAD]),)
        for j in tl.static_range(K):
            # of the column col + j - K // 2: tap K - 1 - j of what is at col
            value = widened(read[k % AHEAD * K + j])
            if j == K // 2:
                total += tl.where(within(row + k, top, count), value, 0.0) if PARTS else value
            summed, added = (), ()
            for i in tl.static_range(K):
                summed += (sums[(K - 1 - j) * K + i] + value * line[i],)
                if INPUT:
                    added += (acc[i] + value * taps[i * K + K - 1 - j],)
            sums, acc = sums[: (K - 1 - j) * K] + summed + sums[(K - j) * K :], added
        line = line[1:]
        if INPUT:
            y = row + k - K // 2
            result = acc[0] + widened(more[k % AHEAD]) if OTHER else acc[0]
            place = dx + y * W * dx_row + dx_at
            tl.store(place, result.to(dx.dtype.element_ty), mask=inside & within(y, top, count))
            acc = acc[1:]
            acc += (zero,)
    return acc, line, sums, total


@triton.jit(do_not_specialize=SIZES)
def _gradients(
    grad, x, weight, other, dx, partial, B, H, W, programs, span, grad_batch, x_batch, x_row, other_batch, other_row,
    dx_batch, dx_row,
    K: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
    PARTS: tl.constexpr, INPUT: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th part of `span` rows of all images; with INPUT the gradient of x, with OTHER on top of it."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    across = tl.cdiv(W, BX)
    down = tl.cdiv(H, span)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    col = tl.program_id(0) // blocks % across * BX + tl.arange(0, BX)
    program = tl.program_id(0) // blocks // across
    live = (c < C)[None, :]
    inside = (col < W)[:, None] & live
    seen = columns_seen(col, live, W, K)
    at = (col[:, None] - K // 2) * ROW + c[None, :]
    x_at = col[:, None] * x_row + c[None, :]
    dx_at = col[:, None] * dx_row + c[None, :]
    other_at = col[:, None] * other_row + c[None, :]
    zero = tl.zeros([BX, BC], tl.float32)
    taps = taps_of(weight, c, C, K, BX, False) if INPUT else ()
    sums = repeated(zero, K * K)
    total = zero
    for part in range(program, B * down, programs):
        image = (part // down).to(tl.int64)
        top = part % down * span
        count = tl.minimum(span, H - top)
        row = tl.maximum(top - K // 2, 0)
        last = tl.minimum(top + count + K // 2, H)
        from_grad, from_x = grad + image * grad_batch, x + image * x_batch
        from_other, to = other + image * other_batch, dx + image * dx_batch
        acc = repeated(zero, K if INPUT else 0)
        line = ()
        for k in tl.static_range(K - 1):
            y = row + k - K // 2
            place = from_x + y * W * x_row + x_at
            line += (widened(tl.load(place, mask=inside & within(y, top, count), other=0.0)),)
        for first in range(row, last, K):
            acc, line, sums, total = _turn(
                acc, line, sums, total, taps, first, last, top, count, from_grad, at, seen, inside, from_x, x_at,
                from_other, other_at, to, dx_at, W, x_row, other_row, dx_row, K, ROW, AHEAD, PARTS, INPUT, OTHER,
            )  # fmt: skip
        whole = row + tl.cdiv(last - row, K) * K
        if INPUT:
            for k in tl.static_range(K // 2):
                y = whole + k - K // 2
                keep = inside & within(y, top, count)
                result = acc[k]
                if OTHER:
                    place = from_other + y * W * other_row + other_at
                    result += widened(tl.load(place, mask=keep, other=0.0))
                tl.store(to + y * W * dx_row + dx_at, result.to(dx.dtype.element_ty), mask=keep)
    # (programs · across, K·K + 1, C)
    partial += ((program * across + tl.program_id(0) // blocks % across) * (K * K + 1)).to(tl.int64) * C + c
    for t in tl.static_range(K * K):
        there = seen[K - 1 - t % K] & inside
        tl.store(partial + t * C, tl.sum(tl.where(there, sums[t % K * K + t // K], 0.0), 0), mask=c < C)
    tl.store(partial + K * K * C, tl.sum(total, 0), mask=c < C)


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    grid: tuple[int, int, int],
    *,
    other: Tensor | None = None,
    trained: bool = True,
) -> tuple[Tensor, Tensor] | None:
    """Writes the gradient of x (without GELU) + `other`, which may be dx itself, into dx.

    Returns those of weight and bias as `weight_gradient` does; None where they are not `trained`.
    """
    if dx is not None and trained and weight.shape[-1] <= WIDEST_IN_ONE:
        sums = _gradients_into(dx, grad, x, weight, grid, other)
    else:
        if dx is not None:
            convolve_into(dx, grad, weight, None, grid, other=other, flip=True)
        sums = weight_gradient(grad, x, weight, grid) if trained else None
    if dx is not None and grid[2] and other is not dx:
        dx[:, : grid[2]] = 0 if other is None else other[:, : grid[2]]
    return sums


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The gradients (C, 1, k, k) and (C,) in float32, summed in a fixed order."""
    return _gradients_into(None, grad, x, weight, grid, None)


def weight_gradient_of_images(grad: Tensor, x: Tensor, K: int, grid: tuple[int, int, int]) -> Tensor:
    """The gradients (B, C, k, k) of weights that every image has of its own, in float32."""
    partial = _launch_gradients(None, grad, x, None, K, grid, None, apart=True)
    total = partial.unflatten(0, (len(x), len(partial) // max(1, len(x)))).sum(1)
    return total[:, :-1].mT.unflatten(2, (K, K)).contiguous()


def _gradients_into(dx, grad, x, weight, grid, other) -> tuple[Tensor, Tensor]:
    C, K = x.shape[2], weight.shape[-1]
    total = _launch_gradients(dx, grad, x, taps_table(weight), K, grid, other).sum(0)
    return total[:-1].t().reshape(C, 1, K, K).contiguous(), total[-1].clone()


def _launch_gradients(dx, grad, x, taps, K: int, grid, other, *, apart: bool = False) -> Tensor:
    """What columns and programs have summed up, (programs · across, K·K + 1, C); `apart`: each of one image."""
    (B, _, C), (H, W, prefix) = x.shape, grid
    plan = Plan.of(grad, W, K, K + 2)
    tiles = plan.tiles(W, C)
    # as many programs as multiprocessors hold at once, by the registers that these take
    light = other is None if K <= 3 else dx is None and K <= WIDEST_IN_ONE
    warps = 12 if light else 8
    wanted = max(1, warps * MULTIPROCESSORS // (plan.warps * tiles))
    down = max(1, min(triton.cdiv(wanted, max(1, B)), H // 8))
    span = triton.cdiv(H, down)
    down = triton.cdiv(H, span)
    programs = B * down if apart else min(wanted, B * down)
    grad, x = rows(grad)[:, prefix:], rows(x)[:, prefix:]
    added, to = other is not None, x if dx is None else dx[:, prefix:]
    other = rows(other)[:, prefix:] if added else to
    partial = partial_sums(x, programs * triton.cdiv(W, plan.columns), K * K + 1, C)
    launch(
        _gradients, (programs * tiles,), grad, x, taps, other, to, partial, B, H, W, programs, span,
        grad.stride(0), *x.stride()[:2], *other.stride()[:2], *to.stride()[:2],
        K=K, C=C, ROW=grad.stride(1), BX=plan.columns, BC=plan.channels, AHEAD=plan.ahead, warps=plan.warps,
        PARTS=down > 1, INPUT=dx is not None, OTHER=added,
    )  # fmt: skip
    return partial


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int, int], *, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    grad = rows(grad)
    if gelu:
        before = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        convolve_into(before, x, weight, bias, grid, other=grad, slope=True)
        grad = before
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = gradients(grad, x, weight, dx, grid)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
