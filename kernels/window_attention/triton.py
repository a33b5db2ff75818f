"""Triton kernels of `kernels.window_attention`: forward and backward, without copies of windows and without atomics.

Rows of a tile are cells of windows, found in the unpadded map by index arithmetic. Windows of at most 64 cells fit one
tile, small ones share it: the whole softmax row is at hand, so the backward is a single pass that needs neither the
output nor statistics. Larger windows are tiled with an online softmax, and their backward has one pass that owns dq and
one that owns dk and dv. Sums over windows are partial buffers, added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.launch import launch, power_of_2, precision, rows

TILE = 64
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cells(cell, window, live, H, W, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr):
    """Of cells of windows: the token, whether it is in the map or completes it, and the side of the seam it is on."""
    across = tl.cdiv(W, WW)
    tall = tl.cdiv(H, WH) * WH
    wide = across * WW
    y = window // across * WH + cell // WW
    x = window % across * WW + cell % WW
    seam = (y >= tall - SY).to(tl.int32) * 2 + (x >= wide - SX).to(tl.int32)
    if SY > 0:
        y += SY
        y = tl.where(y >= tall, y - tall, y)
    if SX > 0:
        x += SX
        x = tl.where(x >= wide, x - wide, x)
    return y * W + x, live & (y < H) & (x < W), live & ((y >= H) | (x >= W)), seam


@triton.jit
def _load(base, token, row, inside, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(base + token[:, None] * row + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _keys(base, token, row, inside, outside, padding, D: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr):
    """As `_load`, with the vector `padding` in the cells that complete the map."""
    x = _load(base, token, row, inside, D, BD)
    if PAD:
        d = tl.arange(0, BD)
        vector = tl.load(padding + d, mask=d < D, other=0.0).to(x.dtype)
        x = tl.where(outside[:, None], vector[None, :], x)
    return x


@triton.jit
def _store(base, token, row, inside, x, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    to = base + token[:, None] * row + d[None, :]
    tl.store(to, x.to(base.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _store_sum(to, x, outside, D: tl.constexpr, BD: tl.constexpr):
    """What the cells that complete the map add to the gradient of a key or value of `padding`."""
    d = tl.arange(0, BD)
    tl.store(to + d, tl.sum(tl.where(outside[:, None], x, 0.0), 0), mask=d < D)


@triton.jit
def _softmax(s, keep):
    """2^(s - max) where `keep`, and one over its sum; zeros in rows that keep nothing."""
    s = tl.where(keep, s, float("-inf"))
    top = tl.max(s, 1)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    return p, 1.0 / tl.where(total == 0.0, 1.0, total)


# Windows of at most 64 cells: one tile holds G of them. A program takes every `splits`-th tile of one head.


@triton.jit
def _cell(r, T: tl.constexpr, G: tl.constexpr):
    """Place of rows of the tile in their window. A remainder would cost the tile's addresses a register each."""
    return r if G == 1 else r % T


@triton.jit
def _fresh(r, turn):
    """r; but the compiler has to find places anew every turn, where it would keep all of them in registers."""
    return r + (turn >> 30)


@triton.jit
def _whole_tile(r, turn, B, M, H, W, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
                G: tl.constexpr):  # fmt: skip
    """Image of this turn's tile, and of its rows what `_cells` says and whether they are a cell at all."""
    T: tl.constexpr = WH * WW
    windows = tl.cdiv(H, WH) * tl.cdiv(W, WW)
    groups = tl.cdiv(windows, G)
    tile = tl.program_id(0) // M + turn * (tl.num_programs(0) // M)
    window = tile % groups * G
    if G > 1:
        window = window + r // T
    live = (r < G * T) & (window < windows) & (tile < B * groups)
    token, inside, outside, seam = _cells(_cell(r, T, G), window, live, H, W, WH, WW, SY, SX)
    return (tile // groups).to(tl.int64), token, inside, outside, seam, live


@triton.jit
def _same(r, T: tl.constexpr, G: tl.constexpr):
    """Pairs of rows that are cells of one window."""
    same = (r < G * T)[:, None] & (r < G * T)[None, :]
    if G > 1:
        same = same & ((r // T)[:, None] == (r // T)[None, :])
    return same


@triton.jit
def _may_attend(r, live, seam, T: tl.constexpr, G: tl.constexpr, SHIFTED: tl.constexpr):
    keep = live[None, :]
    if G > 1:
        keep = keep & ((r // T)[:, None] == (r // T)[None, :])
    if SHIFTED:
        keep = keep & (seam[:, None] == seam[None, :])
    return keep


@triton.jit
def _forward_whole(
    qkv, padding, bias, out, turns, B, M, H, W, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, G: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WH * WW
    C = M * D
    first = tl.program_id(0) % M * D
    r = tl.arange(0, BT)
    if BIAS:
        cell = _cell(r, T, G)
        bias += (tl.program_id(0) % M).to(tl.int64) * (T * T)
        added = tl.load(bias + cell[:, None] * T + cell[None, :], mask=_same(r, T, G), other=0.0).to(tl.float32)
        added *= LOG2E
    for turn in range(0, turns):
        fresh = _fresh(r, turn)
        image, token, inside, outside, seam, live = _whole_tile(fresh, turn, B, M, H, W, WH, WW, SY, SX, G)
        base = qkv + image * batch + first
        q = _load(base, token, row, inside, D, BD)
        k = _keys(base + C, token, row, inside, outside, padding + C + first, D, BD, PAD)
        v = _keys(base + 2 * C, token, row, inside, outside, padding + 2 * C + first, D, BD, PAD)
        s = tl.dot(q, tl.trans(k), input_precision=IP) * (scale * LOG2E)
        if BIAS:
            s += added
        p, inverse = _softmax(s, _may_attend(fresh, live, seam, T, G, SY + SX > 0))
        o = tl.dot(p.to(v.dtype), v, input_precision=IP) * inverse[:, None]
        _store(out + image * (H * W * C) + first, token, C, inside, o, D, BD)


@triton.jit
def _backward_whole(
    grad, qkv, padding, bias, dqkv, dpadding, dbias, turns, B, M, H, W, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, G: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WH * WW
    C = M * D
    head = tl.program_id(0) % M
    split = (tl.program_id(0) // M).to(tl.int64)
    first = head * D
    r = tl.arange(0, BT)
    if BIAS:
        cell = _cell(r, T, G)
        place = cell[:, None] * T + cell[None, :]
        bias += head.to(tl.int64) * (T * T)
        dadded = tl.zeros([BT, BT], tl.float32)
    for turn in range(0, turns):
        fresh = _fresh(r, turn)
        image, token, inside, outside, seam, live = _whole_tile(fresh, turn, B, M, H, W, WH, WW, SY, SX, G)
        base = qkv + image * batch + first
        to = dqkv + image * (3 * H * W * C) + first
        q = _load(base, token, row, inside, D, BD)
        k = _keys(base + C, token, row, inside, outside, padding + C + first, D, BD, PAD)
        v = _keys(base + 2 * C, token, row, inside, outside, padding + 2 * C + first, D, BD, PAD)
        do = _load(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=IP) * (scale * LOG2E)
        if BIAS:
            cells = _cell(fresh, T, G)
            pairs = bias + cells[:, None] * T + cells[None, :]
            s += tl.load(pairs, mask=_same(fresh, T, G), other=0.0).to(tl.float32) * LOG2E
        p, inverse = _softmax(s, _may_attend(fresh, live, seam, T, G, SY + SX > 0))
        p *= inverse[:, None]
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=IP)
        _store(to + 2 * C, token, 3 * C, inside, dv, D, BD)
        if PAD:
            share = dpadding + (split + turn * (tl.num_programs(0) // M)) * (2 * C) + first
            _store_sum(share + C, dv, outside, D, BD)
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if BIAS:
            dadded += ds
        ds = ds.to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=IP) * scale
        _store(to + C, token, 3 * C, inside, dk, D, BD)
        if PAD:
            _store_sum(share, dk, outside, D, BD)
        dq = tl.dot(ds, k, input_precision=IP) * scale
        _store(to, token, 3 * C, inside, dq, D, BD)
    if BIAS:
        # (splits, G, M, T, T)
        dbias += (split * G * M + head) * (T * T)
        if G > 1:
            place += (r // T)[:, None] * (M * T * T)
        tl.store(dbias + place, dadded, mask=_same(r, T, G))


# Larger windows: a program owns BM queries or BN keys of one window and head, and goes through the window.


@triton.jit
def _part(M, H, W, WH: tl.constexpr, WW: tl.constexpr, PARTS: tl.constexpr):
    """Head, part of the window, window and image of this program."""
    program = tl.program_id(0)
    windows = tl.cdiv(H, WH) * tl.cdiv(W, WW)
    window = program // M // PARTS
    return program % M, program // M % PARTS, window % windows, (window // windows).to(tl.int64)


@triton.jit
def _logits(q, k, i, j, live_j, seam_i, seam_j, bias, scale, T: tl.constexpr, SHIFTED: tl.constexpr,
            BIAS: tl.constexpr, IP: tl.constexpr):  # fmt: skip
    """log2(e) times the logits of queries i and keys j, -inf where they may not attend."""
    s = tl.dot(q, tl.trans(k), input_precision=IP) * (scale * LOG2E)
    if BIAS:
        there = (i < T)[:, None] & live_j[None, :]
        s += tl.load(bias + i[:, None] * T + j[None, :], mask=there, other=0.0).to(tl.float32) * LOG2E
    keep = live_j[None, :]
    if SHIFTED:
        keep = keep & (seam_i[:, None] == seam_j[None, :])
    return tl.where(keep, s, float("-inf"))


@triton.jit
def _forward_tiled(
    qkv, padding, bias, out, lse, M, H, W, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WH * WW
    C = M * D
    head, part, window, image = _part(M, H, W, WH, WW, (T + BM - 1) // BM)
    first = head * D
    base = qkv + image * batch + first
    bias += head.to(tl.int64) * (T * T)
    i = part * BM + tl.arange(0, BM)
    token, inside, _, seam = _cells(i, window, i < T, H, W, WH, WW, SY, SX)
    q = _load(base, token, row, inside, D, BD)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BD], tl.float32)
    for start in range(0, T, BN):
        j = start + tl.arange(0, BN)
        token_j, inside_j, outside_j, seam_j = _cells(j, window, j < T, H, W, WH, WW, SY, SX)
        k = _keys(base + C, token_j, row, inside_j, outside_j, padding + C + first, D, BD, PAD)
        v = _keys(base + 2 * C, token_j, row, inside_j, outside_j, padding + 2 * C + first, D, BD, PAD)
        s = _logits(q, k, i, j, j < T, seam, seam_j, bias, scale, T, SY + SX > 0, BIAS, IP)
        higher = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp2(top - finite)
        p = tl.exp2(s - finite[:, None])
        total = total * kept + tl.sum(p, 1)
        o = o * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IP)
        top = higher
    # rows past the window are on neither side of a seam's keys: they may have attended to nothing
    total = tl.where(total == 0.0, 1.0, total)
    _store(out + image * (H * W * C) + first, token, C, inside, o / total[:, None], D, BD)
    tl.store(lse + (image * M + head) * (H * W) + token, top + tl.log2(total), mask=inside)


@triton.jit
def _backward_queries(
    grad, qkv, padding, bias, out, lse, delta, dqkv, M, H, W, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dq, and delta = Σ o do for the other passes."""
    T: tl.constexpr = WH * WW
    C = M * D
    head, part, window, image = _part(M, H, W, WH, WW, (T + BM - 1) // BM)
    first = head * D
    base = qkv + image * batch + first
    bias += head.to(tl.int64) * (T * T)
    place = (image * M + head) * (H * W)
    i = part * BM + tl.arange(0, BM)
    token, inside, _, seam = _cells(i, window, i < T, H, W, WH, WW, SY, SX)
    q = _load(base, token, row, inside, D, BD)
    do = _load(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
    o = _load(out + image * (H * W * C) + first, token, C, inside, D, BD)
    change = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + place + token, change, mask=inside)
    # +inf makes the weights of queries that are not in the map zero
    log = tl.load(lse + place + token, mask=inside, other=float("inf"))
    dq = tl.zeros([BM, BD], tl.float32)
    for start in range(0, T, BN):
        j = start + tl.arange(0, BN)
        token_j, inside_j, outside_j, seam_j = _cells(j, window, j < T, H, W, WH, WW, SY, SX)
        k = _keys(base + C, token_j, row, inside_j, outside_j, padding + C + first, D, BD, PAD)
        v = _keys(base + 2 * C, token_j, row, inside_j, outside_j, padding + 2 * C + first, D, BD, PAD)
        s = _logits(q, k, i, j, j < T, seam, seam_j, bias, scale, T, SY + SX > 0, BIAS, IP)
        p = tl.exp2(s - log[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        dq += tl.dot((p * (dp - change[:, None])).to(k.dtype), k, input_precision=IP)
    _store(dqkv + image * (3 * H * W * C) + first, token, 3 * C, inside, dq * scale, D, BD)


@triton.jit
def _backward_keys(
    grad, qkv, padding, bias, lse, delta, dqkv, dpadding, M, H, W, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WH * WW
    C = M * D
    head, part, window, image = _part(M, H, W, WH, WW, (T + BN - 1) // BN)
    first = head * D
    base = qkv + image * batch + first
    grad += image * grad_batch + first
    bias += head.to(tl.int64) * (T * T)
    place = (image * M + head) * (H * W)
    j = part * BN + tl.arange(0, BN)
    token, inside, outside, seam = _cells(j, window, j < T, H, W, WH, WW, SY, SX)
    k = _keys(base + C, token, row, inside, outside, padding + C + first, D, BD, PAD)
    v = _keys(base + 2 * C, token, row, inside, outside, padding + 2 * C + first, D, BD, PAD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for start in range(0, T, BM):
        i = start + tl.arange(0, BM)
        token_i, inside_i, _, seam_i = _cells(i, window, i < T, H, W, WH, WW, SY, SX)
        q = _load(base, token_i, row, inside_i, D, BD)
        do = _load(grad, token_i, grad_row, inside_i, D, BD)
        log = tl.load(lse + place + token_i, mask=inside_i, other=float("inf"))
        change = tl.load(delta + place + token_i, mask=inside_i, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=IP) * (scale * LOG2E)
        if BIAS:
            there = (j < T)[:, None] & (i < T)[None, :]
            s += tl.load(bias + i[None, :] * T + j[:, None], mask=there, other=0.0).to(tl.float32) * LOG2E
        # keys past the window need no mask: their rows are dropped
        if SY + SX > 0:
            s = tl.where(seam[:, None] == seam_i[None, :], s, float("-inf"))
        p = tl.exp2(s - log[None, :])
        dv += tl.dot(p.to(do.dtype), do, input_precision=IP)
        dp = tl.dot(v, tl.trans(do), input_precision=IP)
        dk += tl.dot((p * (dp - change[None, :])).to(q.dtype), q, input_precision=IP)
    dk *= scale
    to = dqkv + image * (3 * H * W * C) + first
    _store(to + C, token, 3 * C, inside, dk, D, BD)
    _store(to + 2 * C, token, 3 * C, inside, dv, D, BD)
    if PAD:
        share = dpadding + (tl.program_id(0) // M).to(tl.int64) * (2 * C) + first
        _store_sum(share, dk, outside, D, BD)
        _store_sum(share + C, dv, outside, D, BD)


@triton.jit
def _backward_bias(
    grad, qkv, padding, bias, lse, delta, dbias, turns, B, M, H, W, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The gradient of a BM × BN tile of the bias of one head over a share of all windows."""
    T: tl.constexpr = WH * WW
    ACROSS: tl.constexpr = (T + BN - 1) // BN
    PAIRS: tl.constexpr = (T + BM - 1) // BM * ACROSS
    C = M * D
    head = tl.program_id(0) % M
    pair = tl.program_id(0) // M % PAIRS
    split = tl.program_id(0) // M // PAIRS
    splits = tl.num_programs(0) // M // PAIRS
    windows = tl.cdiv(H, WH) * tl.cdiv(W, WW)
    first = head * D
    i = pair // ACROSS * BM + tl.arange(0, BM)
    j = pair % ACROSS * BN + tl.arange(0, BN)
    bias += head.to(tl.int64) * (T * T)
    total = tl.zeros([BM, BN], tl.float32)
    for turn in range(0, turns):
        place = split + turn * splits
        there = place < B * windows
        window = place % windows
        image = (place // windows).to(tl.int64)
        base = qkv + image * batch + first
        token, inside, _, seam = _cells(i, window, (i < T) & there, H, W, WH, WW, SY, SX)
        token_j, inside_j, outside_j, seam_j = _cells(j, window, (j < T) & there, H, W, WH, WW, SY, SX)
        q = _load(base, token, row, inside, D, BD)
        do = _load(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        k = _keys(base + C, token_j, row, inside_j, outside_j, padding + C + first, D, BD, PAD)
        v = _keys(base + 2 * C, token_j, row, inside_j, outside_j, padding + 2 * C + first, D, BD, PAD)
        statistic = (image * M + head) * (H * W) + token
        log = tl.load(lse + statistic, mask=inside, other=float("inf"))
        change = tl.load(delta + statistic, mask=inside, other=0.0)
        s = _logits(q, k, i, j, j < T, seam, seam_j, bias, scale, T, SY + SX > 0, True, IP)
        total += tl.exp2(s - log[:, None]) * (tl.dot(do, tl.trans(v), input_precision=IP) - change[:, None])
    # (splits, M, T, T)
    to = dbias + (split.to(tl.int64) * M + head) * (T * T) + i[:, None] * T + j[None, :]
    tl.store(to, total, mask=(i < T)[:, None] & (j < T)[None, :])


def tiles(tokens: int, windows: int) -> tuple[int, int]:
    """Windows in a tile, and its rows, where windows fit one: as many as there are and as 64 rows hold."""
    together = min(windows, TILE // tokens)
    return together, power_of_2(together * tokens)


def blocks(tokens: int) -> tuple[int, int]:
    """Rows of the owned and of the visited tile of a larger window; visited ones of 32 where that visits less."""
    return TILE, 32 if 0 < tokens % TILE <= 32 else TILE


def turns(work: int, most: int) -> int:
    """Pieces of work for each program: few enough to leave 8 programs per multiprocessor of a large GPU."""
    return max(1, min(most, work // 1056))


def forward(
    qkv: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    grid: tuple[int, int],
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes `out` and, where windows are larger than a tile, the statistics `lse`."""
    qkv, T, windows = rows(qkv), window[0] * window[1], _windows(grid, window)
    constants = _constants(qkv, padding, heads, window, shift) | {"BIAS": bias is not None}
    given = (qkv, qkv if padding is None else padding.contiguous(), qkv if bias is None else bias.contiguous(), out)
    B, strides = qkv.shape[0], (qkv.stride(0), qkv.stride(1))
    if T <= TILE:
        G, BT = tiles(T, windows)
        work = B * triton.cdiv(windows, G)
        each = 1 if bias is None else turns(work * heads, 8)
        launch(
            _forward_whole, (triton.cdiv(work, each) * heads,), *given, each, B, heads, *grid, *strides, scale,
            G=G, BT=BT, **constants,
        )  # fmt: skip
        return
    BM, BN = blocks(T)
    launch(
        _forward_tiled, (B * windows * triton.cdiv(T, BM) * heads,), *given, lse, heads, *grid, *strides, scale,
        BM=BM, BN=BN, **constants,
    )  # fmt: skip


def backward(
    grad: Tensor,
    qkv: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    grid: tuple[int, int],
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, padding and bias; empty ones for what is None. `out` and `lse` are those of larger windows."""
    grad, qkv = rows(grad), rows(qkv)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    given = (grad, qkv, qkv if padding is None else padding.contiguous(), qkv if bias is None else bias.contiguous())
    constants = _constants(qkv, padding, heads, window, shift)
    sizes = (heads, *grid, grad.stride(0), grad.stride(1), qkv.stride(0), qkv.stride(1), scale)
    if window[0] * window[1] <= TILE:
        shares = _backward_of_tiles(given, dqkv, sizes, constants, bias is not None)
    else:
        shares = _backward_in_passes(given, out, lse, dqkv, sizes, constants, bias is not None)
    dpadding = dbias = qkv.new_empty(0)
    if padding is not None:
        # queries that complete the map are dropped
        dpadding = torch.zeros(3, qkv.shape[2] // 3, dtype=torch.float32, device=qkv.device)
        torch.sum(shares[0], 0, out=dpadding[1:])
        dpadding = dpadding.flatten().to(padding.dtype)
    if bias is not None:
        dbias = shares[1].sum(0).to(bias.dtype)
    return dqkv, dpadding, dbias


def _backward_of_tiles(given: tuple, dqkv: Tensor, sizes: tuple, constants: dict, has_bias: bool) -> tuple:
    """Writes `dqkv`; what sums up to the gradients of padding (keys and values) and bias."""
    B, heads, window = len(dqkv), sizes[0], (constants["WH"], constants["WW"])
    T, windows = window[0] * window[1], _windows(sizes[1:3], window)
    G, BT = tiles(T, windows)
    work = B * triton.cdiv(windows, G)
    each = turns(work * heads, work) if has_bias else 1
    splits = triton.cdiv(work, each)
    dpadding = _shares(dqkv, splits * each, 2, dqkv.shape[2] // 3) if constants["PAD"] else dqkv
    dbias = _shares(dqkv, splits * G, heads, T, T) if has_bias else dqkv
    launch(
        _backward_whole, (splits * heads,), *given, dqkv, dpadding, dbias, each, B, *sizes,
        G=G, BT=BT, BIAS=has_bias, **constants,
    )  # fmt: skip
    return dpadding, dbias


def _backward_in_passes(
    given: tuple, out: Tensor, lse: Tensor, dqkv: Tensor, sizes: tuple, constants: dict, has_bias: bool
) -> tuple:
    """As `_backward_of_tiles`."""
    B, heads, window = len(dqkv), sizes[0], (constants["WH"], constants["WW"])
    T, windows = window[0] * window[1], B * _windows(sizes[1:3], window)
    own, visit = blocks(T)
    parts = windows * triton.cdiv(T, own)
    delta = torch.empty_like(lse)
    dpadding = _shares(dqkv, parts, 2, dqkv.shape[2] // 3) if constants["PAD"] else dqkv
    launch(
        _backward_queries, (parts * heads,), *given, out, lse, delta, dqkv, *sizes,
        BM=own, BN=visit, BIAS=has_bias, **constants,
    )  # fmt: skip
    launch(
        _backward_keys, (parts * heads,), *given, lse, delta, dqkv, dpadding, *sizes,
        BM=visit, BN=own, BIAS=has_bias, **constants,
    )  # fmt: skip
    if not has_bias:
        return dpadding, None
    pairs = triton.cdiv(T, own) * triton.cdiv(T, visit)
    each = turns(windows * heads * pairs, windows)
    splits = triton.cdiv(windows, each)
    dbias = _shares(dqkv, splits, heads, T, T)
    launch(
        _backward_bias, (splits * pairs * heads,), *given, lse, delta, dbias, each, B, *sizes,
        BM=own, BN=visit, **constants,
    )  # fmt: skip
    return dpadding, dbias


def _shares(like: Tensor, *shape: int) -> Tensor:
    """What programs add to a sum, each in its own place."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _constants(
    qkv: Tensor, padding: Tensor | None, heads: int, window: tuple[int, int], shift: tuple[int, int]
) -> dict:
    """Constants of every kernel, and its warps and stages.

    Products of float32 are plain multiplications, whose operands take the registers of 8 warps; wide heads take them
    too, and the shared memory of a second stage.
    """
    D = qkv.shape[2] // 3 // heads
    BD, IP = power_of_2(D), precision(qkv.dtype)
    large, exact = BD > 64, IP == "ieee"
    tile = {"D": D, "WH": window[0], "WW": window[1], "SY": shift[0], "SX": shift[1], "BD": BD}
    schedule = {"warps": 8 if large or exact else 4, "stages": 1 if large or exact else 2}
    return tile | schedule | {"PAD": padding is not None, "IP": IP}


def _windows(grid: tuple[int, int], window: tuple[int, int]) -> int:
    return triton.cdiv(grid[0], window[0]) * triton.cdiv(grid[1], window[1])
