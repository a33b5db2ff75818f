"""Triton kernels of `kernels.neighborhood_attention`: forward, and what the backward shares with it.

A residue class of the dilation is a map of its own. A program owns a tile of up to 8 × 8 of its queries, and goes
through the rectangle of keys that any of them sees, some rows at a time: dense products on the matrix unit, with a mask
that is index arithmetic like the offsets of the bias. So 14 × 14 keys are visited for the 49 that each query of a 7 × 7
kernel has, and read once from memory for a tile. The backward visits queries of a tile of keys in the same way. No
atomics: sums over images are partial buffers, added up in a fixed order.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.device.launch import launch, power_of_2, precision, rows, turns
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E
from kernels.neighborhood_attention import rule

OWNED = 64  # cells of a tile
VISITED = 32  # cells of a step through what it visits
SIDE = 8  # of an owned tile at most, downwards
FAR = tl.constexpr(1 << 24)  # from every key


class Tiles(NamedTuple):
    """Of a class: the owned tile, the tiles, and per step the visited rectangle and how many are side by side."""

    tile: tuple[int, int]
    count: tuple[int, int]
    keys: tuple[int, int, int]  # rows and columns of a step, and steps across
    key_steps: int
    queries: tuple[int, int, int]
    whole: bool  # one tile holds the class


@triton.jit
def class_of(M, H, W, DY, DX, TY: tl.constexpr, TX: tl.constexpr):
    """Head, first cell of the tile, residues and sizes of the class, and image of this program."""
    program = tl.program_id(0)
    across = tl.cdiv(tl.cdiv(W, DX), TX)
    tiles = tl.cdiv(tl.cdiv(H, DY), TY) * across
    tile = program // M % tiles
    place = program // M // tiles
    ry, rx, ny, nx, image = residue_of(place, H, W, DY, DX)
    return program % M, tile // across * TY, tile % across * TX, ry, rx, ny, nx, image


@triton.jit
def residue_of(place, H, W, DY, DX):
    """Residues, sizes and image of a class of the batch."""
    ry = place // DX % DY
    rx = place % DX
    return ry, rx, (H - ry + DY - 1) // DY, (W - rx + DX - 1) // DX, (place // (DY * DX)).to(tl.int64)


@triton.jit
def cells(py, px, ry, rx, ny, nx, W, DY, DX, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Places in the class of the cells of a rectangle, their tokens, and whether they are in the map."""
    r = tl.arange(0, BLOCK)
    y = py + r // COLS
    x = px + r % COLS
    inside = (y < ny) & (x < nx)
    if ROWS * COLS < BLOCK:
        inside = inside & (r < ROWS * COLS)
    return y, x, (y * DY + ry) * W + x * DX + rx, inside


@triton.jit
def first_key(p, n, K: tl.constexpr, S: tl.constexpr):
    """Of a cell p in a class of n cells, along one axis."""
    leader = p if S == 1 else p // S * S + S // 2
    return tl.minimum(tl.maximum(leader - K // 2, 0), n - K)


@triton.jit
def keys_of(p, n, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """The first key of the T cells from p, and how many they have together."""
    first = first_key(p, n, K, S)
    return first, first_key(tl.minimum(p + T, n) - 1, n, K, S) + K - first


@triton.jit
def step_of(step, y, x, ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr):
    """The first cell of a step through what is visited."""
    return y + step // ACROSS * ROWS, x + step % ACROSS * COLS


@triton.jit
def first_keys(y, x, ny, nx, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr):
    """Of queries along both axes; what is not in the map has no keys."""
    return tl.where(y < ny, first_key(y, ny, KH, SY), FAR), tl.where(x < nx, first_key(x, nx, KW, SX), FAR)


@triton.jit
def middle_of(rpb, head, KH: tl.constexpr, KW: tl.constexpr):
    """The entry of a head for the offset 0; rows of a table are 2 KW - 1 apart."""
    return rpb + head * ((2 * KH - 1) * (2 * KW - 1)) + ((KH - 1) * (2 * KW - 1) + KW - 1)


@triton.jit
def offsets_in(COLS: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr):
    """How far the entries for the cells of a rectangle are from that of its first; wide, so that they are constants
    in addresses."""
    r = tl.arange(0, BLOCK)
    return (r // COLS * (2 * KW - 1) + r % COLS).to(tl.int64)


@triton.jit
def logits(product, from_y, from_x, key_y, key_x, entries, scale, KH: tl.constexpr, KW: tl.constexpr,
            BIAS: tl.constexpr):  # fmt: skip
    """The logits, -inf for keys that a query does not have; everything is broadcast to pairs."""
    down = key_y - from_y
    across = key_x - from_x
    seen = (down >= 0) & (down < KH) & (across >= 0) & (across < KW)
    if BIAS:
        return product * scale + tl.load(entries, mask=seen, other=float("-inf")).to(tl.float32)
    return tl.where(seen, product * scale, float("-inf"))


@triton.jit
def _forward(
    qkv, rpb, out, lse, M, H, W, DY, DX, batch, row, scale,
    D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    C = M * D
    head, py, px, ry, rx, ny, nx, image = class_of(M, H, W, DY, DX, TY, TX)
    first = head * D
    base = qkv + image * batch + first
    y, x, token, inside = cells(py, px, ry, rx, ny, nx, W, DY, DX, TY, TX, BM)
    from_y, from_x = first_keys(y, x, ny, nx, KH, KW, SY, SX)
    entries = middle_of(rpb, head, KH, KW) - (y * (2 * KW - 1) + x)
    spread = offsets_in(COLS, KW, BN)
    q = load_rows(base, token, row, inside, D, BD)
    start_y, high = keys_of(py, ny, TY, KH, SY)
    start_x = first_key(px, nx, KW, SX)
    top = tl.full([BM], float("-inf"), tl.float32)
    sums = tl.zeros([BM, BN], tl.float32)
    o = tl.zeros([BM, BD], tl.float32)
    for step in range(0, tl.cdiv(high, ROWS) * ACROSS):
        ky, kx = step_of(step, start_y, start_x, ROWS, COLS, ACROSS)
        key_y, key_x, key, there = cells(ky, kx, ry, rx, ny, nx, W, DY, DX, ROWS, COLS, BN)
        k = load_rows(base + C, key, row, there, D, BD)
        v = load_rows(base + 2 * C, key, row, there, D, BD)
        s = logits(
            tl.dot(q, tl.trans(k), input_precision=IP), from_y[:, None], from_x[:, None], key_y[None, :],
            key_x[None, :], (entries + (ky * (2 * KW - 1) + kx))[:, None] + spread[None, :], scale, KH, KW, BIAS,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        above = tl.where(higher == float("-inf"), 0.0, higher * LOG2E)
        p = tl.exp2(s * LOG2E - above[:, None])
        shrink = tl.exp2(top * LOG2E - above)
        sums = sums * shrink[:, None] + p
        top = higher
        o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IP)
    # rows outside of the map have no keys
    total = tl.where(inside, tl.sum(sums, 1), 1.0)
    store_rows(out + image * (H * W * C) + first, token, C, inside, o / total[:, None], D, BD)
    # by way of a tile like o: by itself, its layout would be that of all maxima, which would be computed twice
    statistic = tl.where(tl.arange(0, BD)[None, :] == 0, (top * LOG2E + tl.log2(total))[:, None], float("-inf"))
    statistic = tl.max(tl.maximum(statistic, tl.minimum(o, float("-inf"))), 1)
    tl.store(lse + (image * M + head) * (H * W) + token, statistic, mask=inside)


@triton.jit
def added_to(middle, py, px, ky, kx, ny, nx, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
             TX: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """The bias of pairs of queries from (py, px) and keys from (ky, kx), -inf where a query does not have the key."""
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    y = py + i // TX
    x = px + i % TX
    key_y = ky + j // COLS
    key_x = kx + j % COLS
    from_y, from_x = first_keys(y, x, ny, nx, KH, KW, SY, SX)
    entries = middle - (y * (2 * KW - 1) + x) + (ky * (2 * KW - 1) + kx)
    return logits(
        tl.zeros([BM, BN], tl.float32), from_y[:, None], from_x[:, None], key_y[None, :], key_x[None, :],
        entries[:, None] + offsets_in(COLS, KW, BN)[None, :], 1.0, KH, KW, BIAS,
    )  # fmt: skip


@triton.jit
def weights_of(s):
    """Weights of rows of logits before they are divided by their sum, that sum, and log2(e) times the maximum."""
    top = tl.max(s, 1)
    above = tl.where(top == float("-inf"), 0.0, top * LOG2E)
    p = tl.exp2(s * LOG2E - above[:, None])
    total = tl.sum(p, 1)
    return p, tl.where(total == 0.0, 1.0, total), above


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
def _forward_whole(
    qkv, rpb, out, lse, turns, B, M, H, W, DY, DX, batch, row, scale,
    D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    RAGGED: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Classes that fit a tile, every `splits`-th of them."""
    C = M * D
    head = tl.program_id(0) % M
    first = head * D
    middle = middle_of(rpb, head, KH, KW)
    if not RAGGED:
        added = added_to(middle, 0, 0, 0, 0, H // DY, W // DX, KH, KW, SY, SX, TX, TX, BM, BM, BIAS)
    for turn in range(0, turns):
        place = tl.program_id(0) // M + turn * (tl.num_programs(0) // M)
        ry, rx, ny, nx, image = residue_of(place, H, W, DY, DX)
        # 0, but the compiler has to find places anew every turn, where it would keep all of them in registers
        zero = turn >> 30
        _y, _x, token, inside = cells(zero, 0, ry, rx, ny, nx, W, DY, DX, TY, TX, BM)
        inside = inside & (place < B * DY * DX)
        base = qkv + image * batch + first
        q = load_rows(base, token, row, inside, D, BD)
        k = load_rows(base + C, token, row, inside, D, BD)
        v = load_rows(base + 2 * C, token, row, inside, D, BD)
        if RAGGED:
            added = added_to(middle, zero, 0, zero, 0, ny, nx, KH, KW, SY, SX, TX, TX, BM, BM, BIAS)
        s = tl.dot(q, tl.trans(k), input_precision=IP) * scale + added
        p, total, above = weights_of(s)
        o = tl.dot(p.to(v.dtype), v, input_precision=IP) * (1.0 / total)[:, None]
        store_rows(out + image * (H * W * C) + first, token, C, inside, o, D, BD)
        tl.store(lse + (image * M + head) * (H * W) + token, above + tl.log2(total), mask=inside)


def forward(
    qkv: Tensor,
    rpb: Tensor | None,
    grid: tuple[int, int],
    heads: int,
    sides: tuple,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes `out` and the statistics `lse`; `sides` are kernel, stride and dilation."""
    qkv, tiles = rows(qkv), tiles_of(grid, *sides)
    B, table, bias = len(qkv), qkv if rpb is None else rpb.contiguous(), rpb is not None
    given, sizes = (qkv, table, out, lse), (heads, *grid, *sides[2], qkv.stride(0), qkv.stride(1), scale)
    constants, work = owned(qkv, heads, sides, tiles), B * classes(sides)
    if tiles.whole:
        each = turns(work * heads, 8)
        launch(
            _forward_whole, (triton.cdiv(work, each) * heads,), *given, each, B, *sizes,
            RAGGED=ragged(grid, sides), BIAS=bias, **constants,
        )  # fmt: skip
        return
    programs = work * tiles.count[0] * tiles.count[1] * heads
    launch(_forward, (programs,), *given, *sizes, **constants, **visited(tiles.keys, "BN"), BIAS=bias)


def owned(qkv: Tensor, heads: int, sides: tuple, tiles: Tiles, block: str = "BM") -> dict:
    """Constants of every kernel, and its warps and stages; `block` is the name of the rows of the owned tile.

    Products of float32 are plain multiplications, whose operands take the registers of 8 warps; wide heads take them
    too, and the shared memory of a second stage.
    """
    D = qkv.shape[2] // 3 // heads
    BD, IP = power_of_2(D), precision(qkv.dtype)
    large, exact = BD > 64, IP == "ieee"
    (KH, KW), (SY, SX), _ = sides
    tile = {"D": D, "KH": KH, "KW": KW, "SY": SY, "SX": SX, "TY": tiles.tile[0], "TX": tiles.tile[1]}
    schedule = {"warps": 8 if large or exact else 4, "stages": 1}
    return tile | schedule | {block: power_of_2(tiles.tile[0] * tiles.tile[1]), "BD": BD, "IP": IP}


def visited(step: tuple[int, int, int], block: str) -> dict:
    """Constants of kernels that go through a rectangle; `block` is the name of the cells of a step."""
    ROWS, COLS, ACROSS = step
    return {"ROWS": ROWS, "COLS": COLS, "ACROSS": ACROSS, block: ROWS * COLS}


def classes(sides: tuple) -> int:
    return sides[2][0] * sides[2][1]


def ragged(grid: tuple[int, int], sides: tuple) -> bool:
    """Whether classes differ in size."""
    return any(length % step for length, step in zip(grid, sides[2], strict=True))


@lru_cache(maxsize=256)
def tiles_of(
    grid: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Tiles:
    """Tiles whose sides divide the class well, or blocks of the stride; steps that visit as little as possible."""
    axes = list(zip(grid, kernel, stride, dilation, strict=True))
    high = _tile(*axes[0], SIDE)
    tile = (high, _tile(*axes[1], OWNED // high))
    lengths = [triton.cdiv(length, step) for length, _, _, step in axes]
    count = tuple(triton.cdiv(n, side) for n, side in zip(lengths, tile, strict=True))
    keys, queries = ([reach(*axis, side) for axis, side in zip(axes, tile, strict=True)] for reach in (_keys, _queries))
    step, steps = _step(*keys)
    return Tiles(tile, count, step, steps, _step(*queries)[0], count == (1, 1))


def _tile(length: int, kernel: int, stride: int, dilation: int, most: int) -> int:
    n = triton.cdiv(length, dilation)
    if n > most and 1 < stride <= most:
        return most // stride * stride
    return triton.cdiv(n, triton.cdiv(n, most))


def _keys(length: int, kernel: int, stride: int, dilation: int, tile: int) -> int:
    """How many keys a tile sees along one axis at most, from the first of it in the shortest class."""
    short, n = length // dilation, triton.cdiv(length, dilation)
    return max(
        rule.first_key(min(p + tile, n) - 1, n, kernel, stride) + kernel - rule.first_key(p, short, kernel, stride)
        for p in range(0, n, tile)
    )


def _queries(length: int, kernel: int, stride: int, dilation: int, tile: int) -> int:
    """How many queries see a tile along one axis at most."""
    return max(
        rule.last_query(min(p + tile, n) - 1, n, kernel, stride) + 1 - rule.first_query(p, kernel, stride)
        for n in {length // dilation, triton.cdiv(length, dilation)}
        for p in range(0, n, tile)
    )


def _step(high: int, wide: int) -> tuple[tuple[int, int, int], int]:
    """Rows and columns of the steps through a rectangle, and steps across; and how many there are: the fewest."""
    size = min(power_of_2(high * wide), VISITED)
    columns = [2**i for i in range(size.bit_length())]
    steps = {c: triton.cdiv(high, size // c) * triton.cdiv(wide, c) for c in columns}
    best = min(columns, key=lambda c: (steps[c], triton.cdiv(wide, c)))
    return (size // best, best, triton.cdiv(wide, best)), steps[best]
