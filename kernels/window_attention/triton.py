"""Triton kernels of `kernels.window_attention`: forward and backward, without copies of windows and without atomics.

Rows of a tile are cells of windows, found in the unpadded map by index arithmetic. Windows of at most 64 cells fit one
tile, small ones share it: the whole softmax row is at hand, so the backward is a single pass that needs neither the
output nor statistics. Larger windows are tiled with an online softmax, and their backward has one pass that owns dq and
one that owns dk and dv. Sums over windows are partial buffers, added up in a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.device.launch import launch, power_of_2, precision, rows, turns
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E, online_softmax

TILE = 64


@triton.jit
def locate(cell, window, live, H, W, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr):
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
def load_keys(base, token, row, inside, outside, padding, D: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr):
    """As `load_rows`, with the vector `padding` in the cells that complete the map."""
    x = load_rows(base, token, row, inside, D, BD)
    if PAD:
        d = tl.arange(0, BD)
        vector = tl.load(padding + d, mask=d < D, other=0.0).to(x.dtype)
        x = tl.where(outside[:, None], vector[None, :], x)
    return x


@triton.jit
def softmax(s, keep):
    """2^(s - max) where `keep`, and one over its sum; zeros in rows that keep nothing."""
    s = tl.where(keep, s, float("-inf"))
    top = tl.max(s, 1)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    return p, 1.0 / tl.where(total == 0.0, 1.0, total)


# Windows of at most 64 cells: one tile holds G of them. A program takes every `splits`-th tile of one head.


@triton.jit
def cell_of(r, T: tl.constexpr, G: tl.constexpr):
    """Place of rows of the tile in their window. A remainder would cost the tile's addresses a register each."""
    return r if G == 1 else r % T


@triton.jit
def fresh_rows(r, turn):
    """r; but the compiler has to find places anew every turn, where it would keep all of them in registers."""
    return r + (turn >> 30)


@triton.jit
def whole_tile(r, turn, B, M, H, W, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
                G: tl.constexpr):  # fmt: skip
    """Image of this turn's tile, and of its rows what `locate` says and whether they are a cell at all."""
    T: tl.constexpr = WH * WW
    windows = tl.cdiv(H, WH) * tl.cdiv(W, WW)
    groups = tl.cdiv(windows, G)
    tile = tl.program_id(0) // M + turn * (tl.num_programs(0) // M)
    window = tile % groups * G
    if G > 1:
        window = window + r // T
    live = (r < G * T) & (window < windows) & (tile < B * groups)
    token, inside, outside, seam = locate(cell_of(r, T, G), window, live, H, W, WH, WW, SY, SX)
    return (tile // groups).to(tl.int64), token, inside, outside, seam, live


@triton.jit
def same_window(r, T: tl.constexpr, G: tl.constexpr):
    """Pairs of rows that are cells of one window."""
    same = (r < G * T)[:, None] & (r < G * T)[None, :]
    if G > 1:
        same = same & ((r // T)[:, None] == (r // T)[None, :])
    return same


@triton.jit
def may_attend(r, live, seam, T: tl.constexpr, G: tl.constexpr, SHIFTED: tl.constexpr):
    keep = live[None, :]
    if G > 1:
        keep = keep & ((r // T)[:, None] == (r // T)[None, :])
    if SHIFTED:
        keep = keep & (seam[:, None] == seam[None, :])
    return keep


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
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
        cell = cell_of(r, T, G)
        bias += (tl.program_id(0) % M).to(tl.int64) * (T * T)
        added = tl.load(bias + cell[:, None] * T + cell[None, :], mask=same_window(r, T, G), other=0.0).to(tl.float32)
        added *= LOG2E
    for turn in range(0, turns):
        fresh = fresh_rows(r, turn)
        image, token, inside, outside, seam, live = whole_tile(fresh, turn, B, M, H, W, WH, WW, SY, SX, G)
        base = qkv + image * batch + first
        q = load_rows(base, token, row, inside, D, BD)
        k = load_keys(base + C, token, row, inside, outside, padding + C + first, D, BD, PAD)
        v = load_keys(base + 2 * C, token, row, inside, outside, padding + 2 * C + first, D, BD, PAD)
        s = tl.dot(q, tl.trans(k), input_precision=IP) * (scale * LOG2E)
        if BIAS:
            s += added
        p, inverse = softmax(s, may_attend(fresh, live, seam, T, G, SY + SX > 0))
        o = tl.dot(p.to(v.dtype), v, input_precision=IP) * inverse[:, None]
        store_rows(out + image * (H * W * C) + first, token, C, inside, o, D, BD)


# Larger windows: a program owns BM queries or BN keys of one window and head, and goes through the window.


@triton.jit
def part_of(M, H, W, WH: tl.constexpr, WW: tl.constexpr, PARTS: tl.constexpr):
    """Head, part of the window, window and image of this program."""
    program = tl.program_id(0)
    windows = tl.cdiv(H, WH) * tl.cdiv(W, WW)
    window = program // M // PARTS
    return program % M, program // M % PARTS, window % windows, (window // windows).to(tl.int64)


@triton.jit
def logits(q, k, i, j, live_j, seam_i, seam_j, bias, scale, T: tl.constexpr, SHIFTED: tl.constexpr,
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
    head, part, window, image = part_of(M, H, W, WH, WW, (T + BM - 1) // BM)
    first = head * D
    base = qkv + image * batch + first
    bias += head.to(tl.int64) * (T * T)
    i = part * BM + tl.arange(0, BM)
    token, inside, _, seam = locate(i, window, i < T, H, W, WH, WW, SY, SX)
    q = load_rows(base, token, row, inside, D, BD)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BD], tl.float32)
    for start in range(0, T, BN):
        j = start + tl.arange(0, BN)
        token_j, inside_j, outside_j, seam_j = locate(j, window, j < T, H, W, WH, WW, SY, SX)
        k = load_keys(base + C, token_j, row, inside_j, outside_j, padding + C + first, D, BD, PAD)
        v = load_keys(base + 2 * C, token_j, row, inside_j, outside_j, padding + 2 * C + first, D, BD, PAD)
        s = logits(q, k, i, j, j < T, seam, seam_j, bias, scale, T, SY + SX > 0, BIAS, IP)
        p, shrink, top, total = online_softmax(s, top, total, True)
        o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IP)
    # rows past the window are on neither side of a seam's keys: they may have attended to nothing
    total = tl.where(total == 0.0, 1.0, total)
    store_rows(out + image * (H * W * C) + first, token, C, inside, o / total[:, None], D, BD)
    tl.store(lse + (image * M + head) * (H * W) + token, top + tl.log2(total), mask=inside)


def tiles(tokens: int, windows: int) -> tuple[int, int]:
    """Windows in a tile, and its rows, where windows fit one: as many as there are and as 64 rows hold."""
    together = min(windows, TILE // tokens)
    return together, power_of_2(together * tokens)


def blocks(tokens: int) -> tuple[int, int]:
    """Rows of the owned and of the visited tile of a larger window; visited ones of 32 where that visits less."""
    return TILE, 32 if 0 < tokens % TILE <= 32 else TILE


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
    qkv, T, windows = rows(qkv), window[0] * window[1], windows_in(grid, window)
    constants = constants_of(qkv, padding, heads, window, shift) | {"BIAS": bias is not None}
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


def constants_of(
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


def windows_in(grid: tuple[int, int], window: tuple[int, int]) -> int:
    return triton.cdiv(grid[0], window[0]) * triton.cdiv(grid[1], window[1])
