"""Backward of `kernels.window_attention`, without atomics: one pass for windows of a tile, three for larger ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.launch import launch, partial_sums, rows, turns
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E, row_products
from kernels.window_attention.triton import (
    TILE,
    blocks,
    cell_of,
    constants_of,
    fresh_rows,
    load_keys,
    locate,
    logits,
    may_attend,
    part_of,
    same_window,
    softmax,
    tiles,
    whole_tile,
    windows_in,
)


@triton.jit
def _store_sum(to, x, outside, D: tl.constexpr, BD: tl.constexpr):
    """What the cells that complete the map add to the gradient of a key or value of `padding`."""
    d = tl.arange(0, BD)
    tl.store(to + d, tl.sum(tl.where(outside[:, None], x, 0.0), 0), mask=d < D)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
def _backward_whole(
    grad, qkv, padding, bias, dqkv, dpadding, dbias, turns, B, M, H, W, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, G: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, SUM: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """With SUM the gradient of the bias too."""
    T: tl.constexpr = WH * WW
    C = M * D
    head = tl.program_id(0) % M
    split = (tl.program_id(0) // M).to(tl.int64)
    first = head * D
    r = tl.arange(0, BT)
    if BIAS:
        cell = cell_of(r, T, G)
        place = cell[:, None] * T + cell[None, :]
        bias += head.to(tl.int64) * (T * T)
    if SUM:
        dadded = tl.zeros([BT, BT], tl.float32)
    for turn in range(0, turns):
        fresh = fresh_rows(r, turn)
        image, token, inside, outside, seam, live = whole_tile(fresh, turn, B, M, H, W, WH, WW, SY, SX, G)
        base = qkv + image * batch + first
        to = dqkv + image * (3 * H * W * C) + first
        q = load_rows(base, token, row, inside, D, BD)
        k = load_keys(base + C, token, row, inside, outside, padding + C + first, D, BD, PAD)
        v = load_keys(base + 2 * C, token, row, inside, outside, padding + 2 * C + first, D, BD, PAD)
        do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=IP) * (scale * LOG2E)
        if BIAS:
            cells = cell_of(fresh, T, G)
            pairs = bias + cells[:, None] * T + cells[None, :]
            s += tl.load(pairs, mask=same_window(fresh, T, G), other=0.0).to(tl.float32) * LOG2E
        p, inverse = softmax(s, may_attend(fresh, live, seam, T, G, SY + SX > 0))
        p *= inverse[:, None]
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=IP)
        store_rows(to + 2 * C, token, 3 * C, inside, dv, D, BD)
        if PAD:
            share = dpadding + (split + turn * (tl.num_programs(0) // M)) * (2 * C) + first
            _store_sum(share + C, dv, outside, D, BD)
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if SUM:
            dadded += ds
        ds = ds.to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=IP) * scale
        store_rows(to + C, token, 3 * C, inside, dk, D, BD)
        if PAD:
            _store_sum(share, dk, outside, D, BD)
        dq = tl.dot(ds, k, input_precision=IP) * scale
        store_rows(to, token, 3 * C, inside, dq, D, BD)
    if SUM:
        # (splits, G, M, T, T)
        dbias += (split * G * M + head) * (T * T)
        if G > 1:
            place += (r // T)[:, None] * (M * T * T)
        tl.store(dbias + place, dadded, mask=same_window(r, T, G))


@triton.jit
def _backward_queries(
    grad, qkv, padding, bias, out, lse, delta, dqkv, M, H, W, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dq, and delta = Σ o do for the other passes."""
    T: tl.constexpr = WH * WW
    C = M * D
    head, part, window, image = part_of(M, H, W, WH, WW, (T + BM - 1) // BM)
    first = head * D
    base = qkv + image * batch + first
    bias += head.to(tl.int64) * (T * T)
    place = (image * M + head) * (H * W)
    i = part * BM + tl.arange(0, BM)
    token, inside, _, seam = locate(i, window, i < T, H, W, WH, WW, SY, SX)
    q = load_rows(base, token, row, inside, D, BD)
    do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
    o = load_rows(out + image * (H * W * C) + first, token, C, inside, D, BD)
    change = row_products(o, do)
    tl.store(delta + place + token, change, mask=inside)
    # +inf makes the weights of queries that are not in the map zero
    log = tl.load(lse + place + token, mask=inside, other=float("inf"))
    dq = tl.zeros([BM, BD], tl.float32)
    for start in range(0, T, BN):
        j = start + tl.arange(0, BN)
        token_j, inside_j, outside_j, seam_j = locate(j, window, j < T, H, W, WH, WW, SY, SX)
        k = load_keys(base + C, token_j, row, inside_j, outside_j, padding + C + first, D, BD, PAD)
        v = load_keys(base + 2 * C, token_j, row, inside_j, outside_j, padding + 2 * C + first, D, BD, PAD)
        s = logits(q, k, i, j, j < T, seam, seam_j, bias, scale, T, SY + SX > 0, BIAS, IP)
        p = tl.exp2(s - log[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=IP)
        dq += tl.dot((p * (dp - change[:, None])).to(k.dtype), k, input_precision=IP)
    store_rows(dqkv + image * (3 * H * W * C) + first, token, 3 * C, inside, dq * scale, D, BD)


@triton.jit
def _backward_keys(
    grad, qkv, padding, bias, lse, delta, dqkv, dpadding, M, H, W, grad_batch, grad_row, batch, row, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WH * WW
    C = M * D
    head, part, window, image = part_of(M, H, W, WH, WW, (T + BN - 1) // BN)
    first = head * D
    base = qkv + image * batch + first
    grad += image * grad_batch + first
    bias += head.to(tl.int64) * (T * T)
    place = (image * M + head) * (H * W)
    j = part * BN + tl.arange(0, BN)
    token, inside, outside, seam = locate(j, window, j < T, H, W, WH, WW, SY, SX)
    k = load_keys(base + C, token, row, inside, outside, padding + C + first, D, BD, PAD)
    v = load_keys(base + 2 * C, token, row, inside, outside, padding + 2 * C + first, D, BD, PAD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for start in range(0, T, BM):
        i = start + tl.arange(0, BM)
        token_i, inside_i, _, seam_i = locate(i, window, i < T, H, W, WH, WW, SY, SX)
        q = load_rows(base, token_i, row, inside_i, D, BD)
        do = load_rows(grad, token_i, grad_row, inside_i, D, BD)
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
    store_rows(to + C, token, 3 * C, inside, dk, D, BD)
    store_rows(to + 2 * C, token, 3 * C, inside, dv, D, BD)
    if PAD:
        share = dpadding + (tl.program_id(0) // M).to(tl.int64) * (2 * C) + first
        _store_sum(share, dk, outside, D, BD)
        _store_sum(share + C, dv, outside, D, BD)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
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
        token, inside, _, seam = locate(i, window, (i < T) & there, H, W, WH, WW, SY, SX)
        token_j, inside_j, outside_j, seam_j = locate(j, window, (j < T) & there, H, W, WH, WW, SY, SX)
        q = load_rows(base, token, row, inside, D, BD)
        do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        k = load_keys(base + C, token_j, row, inside_j, outside_j, padding + C + first, D, BD, PAD)
        v = load_keys(base + 2 * C, token_j, row, inside_j, outside_j, padding + 2 * C + first, D, BD, PAD)
        statistic = (image * M + head) * (H * W) + token
        log = tl.load(lse + statistic, mask=inside, other=float("inf"))
        change = tl.load(delta + statistic, mask=inside, other=0.0)
        s = logits(q, k, i, j, j < T, seam, seam_j, bias, scale, T, SY + SX > 0, True, IP)
        total += tl.exp2(s - log[:, None]) * (tl.dot(do, tl.trans(v), input_precision=IP) - change[:, None])
    # (splits, M, T, T)
    to = dbias + (split.to(tl.int64) * M + head) * (T * T) + i[:, None] * T + j[None, :]
    tl.store(to, total, mask=(i < T)[:, None] & (j < T)[None, :])


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
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, padding and bias; empty ones for what is None, and for a bias of which it is not `needed`.

    `out` and `lse` are those of larger windows.
    """
    grad, qkv = rows(grad), rows(qkv)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    given = (grad, qkv, qkv if padding is None else padding.contiguous(), qkv if bias is None else bias.contiguous())
    constants = constants_of(qkv, padding, heads, window, shift)
    sizes = (heads, *grid, grad.stride(0), grad.stride(1), qkv.stride(0), qkv.stride(1), scale)
    constants |= {"BIAS": bias is not None}
    sums = bias is not None and needed[2]
    if window[0] * window[1] <= TILE:
        shares = _backward_of_tiles(given, dqkv, sizes, constants, sums)
    else:
        shares = _backward_in_passes(given, out, lse, dqkv, sizes, constants, sums, any(needed[:2]))
    dpadding = dbias = qkv.new_empty(0)
    if padding is not None:
        # queries that complete the map are dropped
        dpadding = torch.zeros(3, qkv.shape[2] // 3, dtype=torch.float32, device=qkv.device)
        torch.sum(shares[0], 0, out=dpadding[1:])
        dpadding = dpadding.flatten().to(padding.dtype)
    if sums:
        dbias = shares[1].sum(0).to(bias.dtype)
    return dqkv, dpadding, dbias


def _backward_of_tiles(given: tuple, dqkv: Tensor, sizes: tuple, constants: dict, sums: bool) -> tuple:
    """Writes `dqkv`; what sums up to the gradients of padding (keys and values) and, with `sums`, of the bias."""
    B, heads, window = len(dqkv), sizes[0], (constants["WH"], constants["WW"])
    T, windows = window[0] * window[1], windows_in(sizes[1:3], window)
    G, BT = tiles(T, windows)
    work = B * triton.cdiv(windows, G)
    each = turns(work * heads, work) if constants["BIAS"] else 1
    splits = triton.cdiv(work, each)
    dpadding = partial_sums(dqkv, splits * each, 2, dqkv.shape[2] // 3) if constants["PAD"] else dqkv
    dbias = partial_sums(dqkv, splits * G, heads, T, T) if sums else dqkv
    launch(
        _backward_whole, (splits * heads,), *given, dqkv, dpadding, dbias, each, B, *sizes,
        G=G, BT=BT, SUM=sums, **constants,
    )  # fmt: skip
    return dpadding, dbias


def _backward_in_passes(
    given: tuple, out: Tensor, lse: Tensor, dqkv: Tensor, sizes: tuple, constants: dict, sums: bool, keys: bool
) -> tuple:
    """As `_backward_of_tiles`; without `keys` the gradients of keys, values and padding are left out."""
    B, heads, window = len(dqkv), sizes[0], (constants["WH"], constants["WW"])
    T, windows = window[0] * window[1], B * windows_in(sizes[1:3], window)
    own, visit = blocks(T)
    parts = windows * triton.cdiv(T, own)
    delta = torch.empty_like(lse)
    dpadding = partial_sums(dqkv, parts, 2, dqkv.shape[2] // 3) if constants["PAD"] else dqkv
    launch(
        _backward_queries, (parts * heads,), *given, out, lse, delta, dqkv, *sizes,
        BM=own, BN=visit, **constants,
    )  # fmt: skip
    if keys:
        launch(
            _backward_keys, (parts * heads,), *given, lse, delta, dqkv, dpadding, *sizes,
            BM=visit, BN=own, **constants,
        )  # fmt: skip
    if not sums:
        return dpadding, None
    pairs = triton.cdiv(T, own) * triton.cdiv(T, visit)
    each = turns(windows * heads * pairs, windows)
    splits = triton.cdiv(windows, each)
    dbias = partial_sums(dqkv, splits, heads, T, T)
    constants = {name: c for name, c in constants.items() if name != "BIAS"}
    launch(
        _backward_bias, (splits * pairs * heads,), *given, lse, delta, dbias, each, B, *sizes,
        BM=own, BN=visit, **constants,
    )  # fmt: skip
    return dpadding, dbias
