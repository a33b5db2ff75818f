"""Backward of `kernels.neighborhood_attention`: one pass where a tile holds a class, else one for queries and one for
keys; and one for the bias, whose gradient is summed over images where it has a place for each pair, then over pairs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.launch import launch, partial_sums, rows, turns
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E, row_products
from kernels.neighborhood_attention.triton import (
    Tiles,
    added_to,
    cells,
    class_of,
    classes,
    first_key,
    first_keys,
    keys_of,
    logits,
    middle_of,
    offsets_in,
    owned,
    ragged,
    residue_of,
    step_of,
    tiles_of,
    visited,
    weights_of,
)


@triton.jit
def queries_of(p, n, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """The first query that sees one of the T cells from p, and how many there are."""
    RIGHT: tl.constexpr = K - 1 - K // 2
    first = tl.where(p < K, 0, tl.cdiv(p - RIGHT - S // 2, S) * S)
    key = tl.minimum(p + T, n) - 1
    last = tl.where(key >= n - K, n, tl.minimum((key + K // 2 - S // 2) // S * S + S, n))
    return first, last - first


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
def _backward_whole(
    grad, qkv, rpb, dqkv, shares, turns, B, M, H, W, DY, DX, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    RAGGED: tl.constexpr, BIAS: tl.constexpr, SUM: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Classes that fit a tile, every `splits`-th of them; with SUM the gradient of each pair of its cells too."""
    C = M * D
    head = tl.program_id(0) % M
    split = tl.program_id(0) // M
    splits = tl.num_programs(0) // M
    first = head * D
    middle = middle_of(rpb, head, KH, KW)
    if SUM:
        sums = tl.zeros([BM, BM], tl.float32)
    if not RAGGED:
        added = added_to(middle, 0, 0, 0, 0, H // DY, W // DX, KH, KW, SY, SX, TX, TX, BM, BM, BIAS)
    for turn in range(0, turns):
        place = split + turn * splits
        ry, rx, ny, nx, image = residue_of(place, H, W, DY, DX)
        zero = turn >> 30
        _y, _x, token, inside = cells(zero, 0, ry, rx, ny, nx, W, DY, DX, TY, TX, BM)
        inside = inside & (place < B * DY * DX)
        base = qkv + image * batch + first
        q = load_rows(base, token, row, inside, D, BD)
        k = load_rows(base + C, token, row, inside, D, BD)
        v = load_rows(base + 2 * C, token, row, inside, D, BD)
        do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        if RAGGED:
            added = added_to(middle, zero, 0, zero, 0, ny, nx, KH, KW, SY, SX, TX, TX, BM, BM, BIAS)
        s = tl.dot(q, tl.trans(k), input_precision=IP) * scale + added
        p, total, _above = weights_of(s)
        p *= tl.where(inside, 1.0 / total, 0.0)[:, None]
        to = dqkv + image * (3 * H * W * C) + first
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=IP)
        store_rows(to + 2 * C, token, 3 * C, inside, dv, D, BD)
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if SUM:
            sums += ds
        ds = ds.to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=IP) * scale
        store_rows(to + C, token, 3 * C, inside, dk, D, BD)
        dq = tl.dot(ds, k, input_precision=IP) * scale
        store_rows(to, token, 3 * C, inside, dq, D, BD)
    if SUM:
        # (splits, M, BM, BM)
        r = tl.arange(0, BM)
        shares += tl.program_id(0).to(tl.int64) * (BM * BM)
        tl.store(shares + r[:, None] * BM + r[None, :], sums)


@triton.jit
def _backward_queries(
    grad, qkv, rpb, out, lse, delta, dqkv, M, H, W, DY, DX, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dq, and delta = Σ o do for the other passes."""
    C = M * D
    head, py, px, ry, rx, ny, nx, image = class_of(M, H, W, DY, DX, TY, TX)
    first = head * D
    base = qkv + image * batch + first
    y, x, token, inside = cells(py, px, ry, rx, ny, nx, W, DY, DX, TY, TX, BM)
    from_y, from_x = first_keys(y, x, ny, nx, KH, KW, SY, SX)
    entries = middle_of(rpb, head, KH, KW) - (y * (2 * KW - 1) + x)
    spread = offsets_in(COLS, KW, BN)
    q = load_rows(base, token, row, inside, D, BD)
    do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
    o = load_rows(out + image * (H * W * C) + first, token, C, inside, D, BD)
    change = row_products(o, do)
    place = (image * M + head) * (H * W) + token
    tl.store(delta + place, change, mask=inside)
    # +inf makes the weights of queries that are not in the map zero
    log = tl.load(lse + place, mask=inside, other=float("inf"))
    start_y, high = keys_of(py, ny, TY, KH, SY)
    start_x = first_key(px, nx, KW, SX)
    dq = tl.zeros([BM, BD], tl.float32)
    for step in range(0, tl.cdiv(high, ROWS) * ACROSS):
        ky, kx = step_of(step, start_y, start_x, ROWS, COLS, ACROSS)
        key_y, key_x, key, there = cells(ky, kx, ry, rx, ny, nx, W, DY, DX, ROWS, COLS, BN)
        k = load_rows(base + C, key, row, there, D, BD)
        v = load_rows(base + 2 * C, key, row, there, D, BD)
        s = logits(
            tl.dot(q, tl.trans(k), input_precision=IP), from_y[:, None], from_x[:, None], key_y[None, :],
            key_x[None, :], (entries + (ky * (2 * KW - 1) + kx))[:, None] + spread[None, :], scale, KH, KW, BIAS,
        )  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        ds = tl.exp2(s * LOG2E - log[:, None]) * (dp - change[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=IP)
    store_rows(dqkv + image * (3 * H * W * C) + first, token, 3 * C, inside, dq * scale, D, BD)


@triton.jit
def _backward_keys(
    grad, qkv, rpb, lse, delta, dqkv, M, H, W, DY, DX, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, from the queries that see any of them."""
    C = M * D
    head, py, px, ry, rx, ny, nx, image = class_of(M, H, W, DY, DX, TY, TX)
    first = head * D
    base = qkv + image * batch + first
    grad += image * grad_batch + first
    lse += (image * M + head) * (H * W)
    delta += (image * M + head) * (H * W)
    key_y, key_x, key, inside = cells(py, px, ry, rx, ny, nx, W, DY, DX, TY, TX, BN)
    entries = middle_of(rpb, head, KH, KW) + (key_y * (2 * KW - 1) + key_x)
    spread = offsets_in(COLS, KW, BM)
    r = tl.arange(0, BM)
    tokens = (r // COLS).to(tl.int64) * (DY * W) + (r % COLS).to(tl.int64) * DX
    k = load_rows(base + C, key, row, inside, D, BD)
    v = load_rows(base + 2 * C, key, row, inside, D, BD)
    start_y, high = queries_of(py, ny, TY, KH, SY)
    start_x, _wide = queries_of(px, nx, TX, KW, SX)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for step in range(0, tl.cdiv(high, ROWS) * ACROSS):
        qy, qx = step_of(step, start_y, start_x, ROWS, COLS, ACROSS)
        y, x, token, there = cells(qy, qx, ry, rx, ny, nx, W, DY, DX, ROWS, COLS, BM)
        from_y, from_x = first_keys(y, x, ny, nx, KH, KW, SY, SX)
        q = load_rows(base, token, row, there, D, BD)
        do = load_rows(grad, token, grad_row, there, D, BD)
        start = (qy * DY + ry) * W + qx * DX + rx
        log = tl.load(lse + start + tokens, mask=there, other=float("inf"))
        change = tl.load(delta + start + tokens, mask=there, other=0.0)
        s = logits(
            tl.dot(k, tl.trans(q), input_precision=IP), from_y[None, :], from_x[None, :], key_y[:, None],
            key_x[:, None], (entries - (qy * (2 * KW - 1) + qx))[:, None] - spread[None, :], scale, KH, KW, BIAS,
        )  # fmt: skip
        p = tl.exp2(s * LOG2E - log[None, :])
        dv += tl.dot(p.to(do.dtype), do, input_precision=IP)
        dp = tl.dot(v, tl.trans(do), input_precision=IP)
        dk += tl.dot((p * (dp - change[None, :])).to(q.dtype), q, input_precision=IP)
    to = dqkv + image * (3 * H * W * C) + first
    store_rows(to + C, key, 3 * C, inside, dk * scale, D, BD)
    store_rows(to + 2 * C, key, 3 * C, inside, dv, D, BD)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
def _backward_bias(
    grad, qkv, rpb, lse, delta, shares, turns, B, M, H, W, DY, DX, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr,
    STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, RAGGED: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """The gradient of each pair of a tile of queries and a step of its keys, over a share of images and classes."""
    C = M * D
    across = tl.cdiv(tl.cdiv(W, DX), TX)
    pairs = tl.cdiv(tl.cdiv(H, DY), TY) * across * STEPS
    head = tl.program_id(0) % M
    pair = tl.program_id(0) // M % pairs
    split = tl.program_id(0) // M // pairs
    splits = tl.num_programs(0) // M // pairs
    first = head * D
    tile = pair // STEPS
    py = tile // across * TY
    px = tile % across * TX
    # the same place in all classes: that of the shortest
    ky, kx = step_of(pair % STEPS, first_key(py, H // DY, KH, SY), first_key(px, W // DX, KW, SX), ROWS, COLS, ACROSS)
    middle = middle_of(rpb, head, KH, KW)
    if not RAGGED:
        added = added_to(middle, py, px, ky, kx, H // DY, W // DX, KH, KW, SY, SX, TX, COLS, BM, BN, True)
    sums = tl.zeros([BM, BN], tl.float32)
    for turn in range(0, turns):
        place = split + turn * splits
        ry, rx, ny, nx, image = residue_of(place, H, W, DY, DX)
        there = place < B * DY * DX
        _y, _x, token, inside = cells(py, px, ry, rx, ny, nx, W, DY, DX, TY, TX, BM)
        _ky, _kx, key, inside_key = cells(ky, kx, ry, rx, ny, nx, W, DY, DX, ROWS, COLS, BN)
        inside = inside & there
        inside_key = inside_key & there
        base = qkv + image * batch + first
        q = load_rows(base, token, row, inside, D, BD)
        do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        k = load_rows(base + C, key, row, inside_key, D, BD)
        v = load_rows(base + 2 * C, key, row, inside_key, D, BD)
        statistic = (image * M + head) * (H * W) + token
        log = tl.load(lse + statistic, mask=inside, other=float("inf"))
        change = tl.load(delta + statistic, mask=inside, other=0.0)
        if RAGGED:
            added = added_to(middle, py, px, ky, kx, ny, nx, KH, KW, SY, SX, TX, COLS, BM, BN, True)
        s = tl.dot(q, tl.trans(k), input_precision=IP) * scale + added
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        sums += tl.exp2(s * LOG2E - log[:, None]) * (dp - change[:, None])
    # (splits, M, tiles, steps, BM, BN)
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    shares += ((split * M + head) * pairs + pair).to(tl.int64) * (BM * BN)
    tl.store(shares + i[:, None] * BN + j[None, :], sums)


@triton.jit
def _sums_of_offsets(
    sums, drpb, M, H, W, DY, DX,
    KH: tl.constexpr, KW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACROSS: tl.constexpr, STEPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A row of the bias's gradient: sums over all queries of the pairs with the keys at those offsets."""
    head = tl.program_id(0) // (2 * KH - 1)
    down = tl.program_id(0) % (2 * KH - 1) - (KH - 1)
    entry = tl.arange(0, BK)
    ny = tl.cdiv(H, DY)
    nx = tl.cdiv(W, DX)
    across = tl.cdiv(nx, TX)
    tiles = tl.cdiv(ny, TY) * across
    total = tl.zeros([BLOCK, BK], tl.float32)
    for start in range(0, ny * nx, BLOCK):
        i = start + tl.arange(0, BLOCK)
        y = i // nx
        x = i % nx
        key_y = y + down
        key_x = x[:, None] + entry[None, :] - (KW - 1)
        kept = ((i < ny * nx) & (key_y >= 0) & (key_y < ny))[:, None] & (key_x >= 0) & (key_x < nx)
        # within the steps of the tile
        key_y -= first_key(y // TY * TY, H // DY, KH, SY)
        key_x -= first_key(x // TX * TX, W // DX, KW, SX)[:, None]
        step = (key_y // ROWS * ACROSS)[:, None] + key_x // COLS
        kept = kept & (key_y >= 0)[:, None] & (key_x >= 0) & (key_x < ACROSS * COLS) & (step < STEPS)
        tile = (head * tiles + y // TY * across + x // TX).to(tl.int64) * STEPS
        place = (y % TY * TX + x % TX) * BN + key_y % ROWS * COLS
        pairs = (tile * (BM * BN) + place)[:, None] + step * (BM * BN) + key_x % COLS
        total += tl.load(sums + pairs, mask=kept & (entry < 2 * KW - 1)[None, :], other=0.0)
    to = drpb + tl.program_id(0) * (2 * KW - 1) + entry
    tl.store(to, tl.sum(total, 0).to(drpb.dtype.element_ty), mask=entry < 2 * KW - 1)


def backward(
    grad: Tensor,
    qkv: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: tuple[int, int],
    heads: int,
    sides: tuple,
    scale: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of the bias; an empty one for a bias that is None or not `needed`."""
    grad, qkv, tiles = rows(grad), rows(qkv), tiles_of(grid, *sides)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    summed = rpb is not None and needed[1]
    given = (grad, qkv, qkv if rpb is None else rpb.contiguous())
    sizes = (heads, *grid, *sides[2], grad.stride(0), grad.stride(1), qkv.stride(0), qkv.stride(1), scale)
    if tiles.whole:
        sums = _backward_of_tiles(given, dqkv, sizes, sides, tiles, rpb is not None, summed)
    else:
        sums = _backward_in_passes(given, out, lse, dqkv, sizes, sides, tiles, rpb is not None, needed[0], summed)
    if not summed:
        return dqkv, qkv.new_empty(0)
    drpb = torch.empty(rpb.shape, dtype=rpb.dtype, device=rpb.device)
    constants = owned(qkv, heads, sides, tiles) | _summed(tiles)
    constants = {name: c for name, c in constants.items() if name not in ("D", "BD", "IP", "warps", "stages")}
    launch(
        _sums_of_offsets, (heads * rpb.shape[1],), sums.sum(0), drpb, *sizes[:5], BLOCK=64,
        BK=triton.next_power_of_2(rpb.shape[2]), **constants,
    )  # fmt: skip
    return dqkv, drpb


def _summed(tiles: Tiles) -> dict:
    """Of the sums of pairs: a class in one tile is one step of as many cells."""
    if not tiles.whole:
        return visited(tiles.keys, "BN") | {"STEPS": tiles.key_steps}
    (TY, TX), BN = tiles.tile, max(16, triton.next_power_of_2(tiles.tile[0] * tiles.tile[1]))
    return {"ROWS": TY, "COLS": TX, "ACROSS": 1, "BN": BN, "STEPS": 1}


def _backward_of_tiles(
    given: tuple, dqkv: Tensor, sizes: tuple, sides: tuple, tiles: Tiles, bias: bool, summed: bool
) -> Tensor:
    """Writes `dqkv`; gives what sums up to the gradient of each pair of cells with `summed`."""
    heads, B = sizes[0], len(dqkv)
    work = B * classes(sides)
    splits = triton.cdiv(work, turns(work * heads, work)) if summed else work
    each = triton.cdiv(work, max(splits, 1))
    constants = owned(dqkv, heads, sides, tiles)
    shares = partial_sums(dqkv, splits, heads, constants["BM"], constants["BM"]) if summed else dqkv
    launch(
        _backward_whole, (splits * heads,), *given, dqkv, shares, each, B, *sizes,
        RAGGED=ragged(sizes[1:3], sides), BIAS=bias, SUM=summed, **constants,
    )  # fmt: skip
    return shares


def _backward_in_passes(
    given: tuple, out: Tensor, lse: Tensor, dqkv: Tensor, sizes: tuple, sides: tuple, tiles: Tiles,
    bias: bool, keys: bool, summed: bool,
) -> Tensor | None:  # fmt: skip
    """As `_backward_of_tiles`; without `keys` the gradients of keys and values are left out."""
    heads, B, of_class = sizes[0], len(dqkv), tiles.count[0] * tiles.count[1]
    programs, delta = B * classes(sides) * of_class * heads, torch.empty_like(lse)
    queries = owned(dqkv, heads, sides, tiles) | visited(tiles.keys, "BN")
    launch(_backward_queries, (programs,), *given, out, lse, delta, dqkv, *sizes, BIAS=bias, **queries)
    if keys:
        constants = owned(dqkv, heads, sides, tiles, "BN") | visited(tiles.queries, "BM")
        launch(_backward_keys, (programs,), *given, lse, delta, dqkv, *sizes, BIAS=bias, **constants)
    if not summed:
        return None
    pairs, work = of_class * tiles.key_steps, B * classes(sides)
    splits = triton.cdiv(work, turns(work * pairs * heads, work))
    each = triton.cdiv(work, max(splits, 1))
    shares = partial_sums(dqkv, splits, heads, pairs, queries["BM"], queries["BN"])
    launch(
        _backward_bias, (splits * pairs * heads,), *given, lse, delta, shares, each, B, *sizes,
        STEPS=tiles.key_steps, RAGGED=ragged(sizes[1:3], sides), **queries,
    )  # fmt: skip
    return shares
