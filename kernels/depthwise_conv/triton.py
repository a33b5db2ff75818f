"""Triton kernels of `kernels.depthwise_conv`: forward and the gradient of the input; those of the weights are beside.

A program goes down BX columns × BC channels of a map, a row at a time, with the weights in registers. A row that is
read is added to all the K output rows that see it, so an output costs K loads instead of K². Channels are the fast axis
of memory; the K shifts of a row hit the L1 cache. K steps are one turn of the loop: the sums of K rows, each of which
takes the next one's place in a step, are back where they were. Some rows are loaded together, before the first of them
is used: that hides the latency.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.device.conv import columns_seen, load_shifted, per_channel, repeated, taps_of, widened, within
from kernels.device.launch import MULTIPROCESSORS, launch, power_of_2, rows, turns

ROOT, LOG2E = tl.constexpr(0.3989422804014327), tl.constexpr(1.4426950408889634)  # 1 / √(2π), log2 e

SIZES = ("B", "H", "W", "programs", "span")  # another batch or map needs no other machine code


@triton.jit
def _normal(x):
    """Φ(x), exact to 1e-6, as x Φ(x) is. log2 Φ(-a) is nearly a polynomial, fitted here for a from 0 to 6.5.

    Half the instructions of Abramowitz and Stegun's 26.2.17, which divides. Beyond 6.5 it falls on, and 2 to it is 0.
    """
    a = tl.abs(x)
    tail = ((-5.0039345e-4 * a + 7.28445517e-3) * a - 5.23526482e-2) * a - 4.59397184e-1
    tail = tl.exp2((tail * a - 1.15106364) * a - 1.0)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def _finish(
    acc, more, value, out, twin, keep, OTHER: tl.constexpr, GELU: tl.constexpr, SLOPE: tl.constexpr, GATED: tl.constexpr
):
    """Stores gelu(acc) + more, or with SLOPE more · gelu'(acc).

    GATED: gelu(acc) · more, or more · value · gelu'(acc), and in `twin` the gradient of the value, more · gelu(acc).
    """
    if SLOPE:
        normal = _normal(acc)
        more = widened(more)
        if GATED:
            tl.store(twin, (more * (acc * normal)).to(twin.dtype.element_ty), mask=keep)
            more *= widened(value)
        density = tl.exp2(acc * acc * (-0.5 * LOG2E)) * ROOT
        acc = more * (normal + acc * density)
    else:
        if GELU:
            acc *= _normal(acc)
        if GATED:
            acc *= widened(more)
        elif OTHER:
            acc += widened(more)
    tl.store(out, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _turn(
    acc, start, taps, row, last, top, count, x, at, seen, inside, other, other_at, value, value_at, out, out_at,
    twin, twin_at, W, other_row, out_row, twin_row,
    K: tl.constexpr, ROW: tl.constexpr, AHEAD: tl.constexpr,
    OTHER: tl.constexpr, GELU: tl.constexpr, SLOPE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Adds K input rows, some perhaps after the last, and stores the K output rows that are complete with them."""
    for k in tl.static_range(K):
        if k % AHEAD == 0:
            read, more, gates = (), (), ()
            for n in tl.static_range(k, min(k + AHEAD, K)):
                read = read + load_shifted(x, row + n, W, at, seen, row + n < last, K, ROW, n > 0)
                y = row + n - K // 2
                if OTHER:
                    place = other + y * W * other_row + other_at
                    more += (tl.load(place, mask=inside & within(y, top, count), other=0.0),)
                else:
                    more += (start,)
                if SLOPE and GATED:
                    place = value + y * W * ROW + value_at
                    gates += (tl.load(place, mask=inside & within(y, top, count), other=0.0),)
                else:
                    gates += (start,)
        for j in tl.static_range(K):
            seen_here = widened(read[k % AHEAD * K + j])
            added = ()
            for i in tl.static_range(K):
                added += (acc[i] + seen_here * taps[(K - 1 - i) * K + j],)
            acc = added
        y = row + k - K // 2
        place, besides = out + y * W * out_row + out_at, twin + y * W * twin_row + twin_at
        keep = inside & within(y, top, count)
        _finish(acc[0], more[k % AHEAD], gates[k % AHEAD], place, besides, keep, OTHER, GELU, SLOPE, GATED)
        acc = acc[1:]
        acc += (start,)
    return acc


@triton.jit(do_not_specialize=SIZES)
def _convolve(
    x, weight, bias, other, value, out, twin, B, H, W, programs, span, x_batch, out_batch, out_row, other_batch,
    other_row, twin_batch, twin_row,
    K: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr, AHEAD: tl.constexpr,
    BIAS: tl.constexpr, FLIP: tl.constexpr, OTHER: tl.constexpr, GELU: tl.constexpr, SLOPE: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th part of `span` rows of all images; the value lies as x does."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    across = tl.cdiv(W, BX)
    down = tl.cdiv(H, span)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    col = tl.program_id(0) // blocks % across * BX + tl.arange(0, BX)
    live = (c < C)[None, :]
    inside = (col < W)[:, None] & live
    seen = columns_seen(col, live, W, K)
    at = (col[:, None] - K // 2) * ROW + c[None, :]
    out_at = col[:, None] * out_row + c[None, :]
    other_at = col[:, None] * other_row + c[None, :]
    value_at = col[:, None] * ROW + c[None, :]
    twin_at = col[:, None] * twin_row + c[None, :]
    taps = taps_of(weight, c, C, K, BX, FLIP)
    start = tl.zeros([BX, BC], tl.float32)
    if BIAS:
        start += per_channel(bias, c, C, BX)
    for part in range(tl.program_id(0) // blocks // across, B * down, programs):
        image = (part // down).to(tl.int64)
        top = part % down * span
        count = tl.minimum(span, H - top)
        row = tl.maximum(top - K // 2, 0)
        last = tl.minimum(top + count + K // 2, H)
        from_x, from_other, to = x + image * x_batch, other + image * other_batch, out + image * out_batch
        from_value, besides = value + image * x_batch, twin + image * twin_batch
        acc = repeated(start, K)
        for first in range(row, last, K):
            acc = _turn(
                acc, start, taps, first, last, top, count, from_x, at, seen, inside, from_other, other_at, from_value,
                value_at, to, out_at, besides, twin_at, W, other_row, out_row, twin_row,
                K, ROW, AHEAD, OTHER, GELU, SLOPE, GATED,
            )  # fmt: skip
        whole = row + tl.cdiv(last - row, K) * K
        for k in tl.static_range(K // 2):
            y = whole + k - K // 2
            keep = inside & within(y, top, count)
            more, gate = start, start
            if OTHER:
                more = tl.load(from_other + y * W * other_row + other_at, mask=keep, other=0.0)
            if SLOPE and GATED:
                gate = tl.load(from_value + y * W * ROW + value_at, mask=keep, other=0.0)
            place, twin_place = to + y * W * out_row + out_at, besides + y * W * twin_row + twin_at
            _finish(acc[k], more, gate, place, twin_place, keep, OTHER, GELU, SLOPE, GATED)


class Plan(NamedTuple):
    """How maps are divided: columns and channels of a program, its warps, and the rows that it loads together."""

    columns: int
    channels: int
    warps: int
    ahead: int

    @classmethod
    def of(cls, x: Tensor, W: int, K: int, loads: int) -> "Plan":
        """For `loads` of each row. A thread holds 4 channels of a column, or 2 with 5×5 weights: it has all weights."""
        C, held = x.shape[2], 4 if K <= 3 else 2
        columns = min(8, power_of_2(W, least=4))
        channels = 64 if K <= 3 and C % 64 == 0 else min(32, power_of_2(C))
        # 25 registers for what is loaded and waits
        ahead = max(1, min(K, 25 * 4 // (loads * held * x.element_size())))
        return cls(columns, channels, max(1, columns * channels // (32 * held)), ahead)

    def tiles(self, W: int, C: int) -> int:
        return triton.cdiv(W, self.columns) * triton.cdiv(C, self.channels)

    def span(self, B: int, H: int, tiles: int) -> int:
        """Rows of a part: all of them where images fill a large GPU, else fewer, but 8."""
        wanted = triton.cdiv(8 * MULTIPROCESSORS, max(1, B * tiles))
        return triton.cdiv(H, max(1, min(wanted, H // 8)))


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
    convolve_into(out, x, weight, bias, grid, other=residual, gelu=gelu)
    if grid[2] and residual is not out:
        out[:, : grid[2]] = 0 if residual is None else residual[:, : grid[2]]
    return out


def convolve_into(
    out, x, weight, bias, grid, *, other=None, gelu=False, slope=False, flip=False, gated=False, value=None, twin=None
) -> None:
    """The map's part of all of these; with `slope` other · gelu'(conv(x) + bias).

    `gated`: the other is multiplied, not added; with `slope` so is `value`, which lies in memory as x does, and `twin`
    becomes other · gelu(conv(x) + bias), its gradient.
    """
    (B, _, C), (H, W, prefix), K = x.shape, grid, weight.shape[-1]
    plan = Plan.of(x, W, K, K)
    tiles = plan.tiles(W, C)
    span = plan.span(B, H, tiles)
    parts = B * triton.cdiv(H, span)
    # programs of 4 warps, twice as many as `turns` leaves
    programs = triton.cdiv(parts, turns(parts * tiles * plan.warps // 8, parts)) if parts else 0
    x, out, added = rows(x)[:, prefix:], out[:, prefix:], other is not None
    other = rows(other)[:, prefix:] if added else out
    value, twin = x if value is None else value[:, prefix:], out if twin is None else twin[:, prefix:]
    launch(
        _convolve, (programs * tiles,), x, taps_table(weight), bias, other, value, out, twin, B, H, W, programs, span,
        x.stride(0), *out.stride()[:2], *other.stride()[:2], *twin.stride()[:2],
        K=K, C=C, ROW=x.stride(1), BX=plan.columns, BC=plan.channels, AHEAD=plan.ahead, warps=plan.warps,
        BIAS=bias is not None, FLIP=flip, OTHER=added, GELU=gelu, SLOPE=slope, GATED=gated,
    )  # fmt: skip


def taps_table(weight: Tensor) -> Tensor:
    """(k·k, C)."""
    return weight.flatten(1).t().contiguous()
