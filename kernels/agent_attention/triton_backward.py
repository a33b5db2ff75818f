"""Backward of `kernels.agent_attention`, without atomics: two launches, three where there are few images.

First the gradients of V_A and of the agents, a program per image and head. Then those of the tokens: a program owns a
tile of tokens and a head, goes through a group of images, and keeps the gradient of its piece of a bias table in
registers: a partial table per group instead of one per image. With bias tables one launch more, which adds up the
groups; the gradient of a convolution's weights is that of `kernels.depthwise_conv.triton`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.agent_attention.triton import (
    SIZES,
    choose,
    padded_tables,
    splits,
    table_of,
    taps_of,
    tiles,
    tokens_in_bin,
    within_bin,
)
from kernels.depthwise_conv import triton_backward as depthwise_conv
from kernels.device.conv import convolve
from kernels.device.launch import MULTIPROCESSORS, launch, precision, rows
from kernels.device.memory import load_tile
from kernels.device.softmax import LOG2E, row_products


@triton.jit(do_not_specialize=["groups"])
def _fold(parts, db1, db2, groups, M, N, A: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, BT: tl.constexpr,
          AP: tl.constexpr):  # fmt: skip
    """The gradients (M, A, N) and (M, N, A) of the tables: sums over groups of images, in their order."""
    head = tl.program_id(0) % M
    t = tl.program_id(0) // M * BT + tl.arange(0, BT)
    a = tl.arange(0, AP)
    inside = (t < N)[:, None] & (a < A)[None, :]
    size = tl.cdiv(N, BT) * BT * AP
    parts += head.to(tl.int64) * size + t[:, None] * AP + a[None, :]
    if BIAS1:
        total = tl.zeros([BT, AP], tl.float32)
        for group in range(groups):
            total += tl.load(parts + (2 * group) * (M * size).to(tl.int64))
        place = head * A * N + a[None, :] * N + t[:, None]
        tl.store(db1 + place, total.to(db1.dtype.element_ty), mask=inside)
    if BIAS2:
        total = tl.zeros([BT, AP], tl.float32)
        for group in range(groups):
            total += tl.load(parts + (2 * group + 1) * (M * size).to(tl.int64))
        place = head * N * A + t[:, None] * A + a[None, :]
        tl.store(db2 + place, total.to(db2.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pairs", "H", "W", "N", "share"])
def _agent_gradients(
    grad, qkv, tables, pooled, gathered, lse, dgathered, dpooled, delta, pairs, M, H, W, N, scale, share,
    grad_batch, grad_row, batch, row,
    D: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    BT: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradients of V_A, and of the agents for each token in their bins: from the queries, then from the keys."""
    A: tl.constexpr = DOWN * ACROSS
    pair = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % M
    part = pair + tl.program_id(1).to(tl.int64) * pairs
    a = tl.arange(0, AP)
    d = tl.arange(0, DP)
    C = M * D
    inside = (a < A)[:, None] & (d < D)[None, :]
    place = a[:, None] * D + d[None, :]
    grad += pair // M * grad_batch + head * D
    qkv += pair // M * batch + head * D
    agents = tl.load(pooled + pair * A * D + place, mask=inside, other=0.0)
    values = tl.load(gathered + pair * A * D + place, mask=inside, other=0.0)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, N)
    dagents = tl.zeros([AP, DP], tl.float32)
    if QUERIES:
        dvalues = tl.zeros([AP, DP], tl.float32)
        for start in range(first, last, BT):
            t = start + tl.arange(0, BT)
            q = load_tile(qkv, t, row, d, t < N, d < D)
            g = load_tile(grad, t, grad_row, d, t < N, d < D)
            p = choose(q, agents, tables, M, head, t, a, N, A, scale, BIAS2, BT, AP, IP)
            dp = tl.dot(g, tl.trans(values), input_precision=IP)
            dvalues += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=IP)
            ds = p * (dp - tl.sum(p * dp, 1)[:, None])
            dagents += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=IP)
        tl.store(dgathered + part * A * D + place, dvalues.to(dgathered.dtype.element_ty), mask=inside)
    else:
        dvalues = tl.load(dgathered + pair * A * D + place, mask=inside, other=0.0)
    if KEYS:
        dv = dvalues.to(agents.dtype)
        # loaded again: from before the first loop they would take registers all the way
        agents = tl.load(pooled + pair * A * D + place, mask=inside, other=0.0)
        values = tl.load(gathered + pair * A * D + place, mask=inside, other=0.0)
        total = row_products(dv, values)
        log = tl.load(lse + pair * A + a, mask=a < A, other=0.0)
        tl.store(delta + part * A + a, total, mask=a < A)
        for start in range(first, last, BT):
            t = start + tl.arange(0, BT)
            k = load_tile(qkv + C, t, row, d, t < N, d < D)
            v = load_tile(qkv + 2 * C, t, row, d, t < N, d < D)
            s = tl.dot(agents, tl.trans(k), input_precision=IP) * (scale * LOG2E)
            if BIAS1:
                s += table_of(tables, 0, M, head, t[None, :], a[:, None], N, BT, AP)
            else:
                s = tl.where((t < N)[None, :], s, float("-inf"))
            p = tl.exp2(s - log[:, None])
            dp = tl.dot(dv, tl.trans(v), input_precision=IP)
            dagents += tl.dot((p * (dp - total[:, None])).to(k.dtype), k, input_precision=IP)
    dagents = dagents * (scale / tokens_in_bin(a, H, W, DOWN, ACROSS))[:, None]
    tl.store(dpooled + part * A * D + place, dagents.to(dpooled.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", *SIZES, "images"])
def _token_gradients(
    grad, qkv, tables, taps, pooled, gathered, lse, dgathered, dpooled, delta, dqkv, dtables,
    B, M, H, W, P, N, scale, images, grad_batch, grad_row, batch, row,
    D: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Even programs: dQ and the gradient of B2 of a tile of tokens over a group of images. Odd ones: dK, dV, B1."""
    A: tl.constexpr = DOWN * ACROSS
    side = tl.program_id(0) % 2
    head = tl.program_id(0) // 2 % M
    tile = tl.program_id(0) // 2 // M
    tiles = tl.cdiv(N, BT)
    group = (tile // tiles).to(tl.int64)
    first = group * images
    last = tl.minimum(first + images, B)
    t = tile % tiles * BT + tl.arange(0, BT)
    a = tl.arange(0, AP)
    d = tl.arange(0, DP)
    C = M * D
    inside = (a < A)[:, None] & (d < D)[None, :]
    place = a[:, None] * D + d[None, :]
    out = t[:, None] * (3 * C) + head * D + d[None, :]
    kept = (t < N)[:, None] & (d < D)[None, :]
    if side == 0:
        dtable = tl.zeros([BT, AP], tl.float32)
        within = within_bin(a[None, :], t[:, None], H, W, P, DOWN, ACROSS).to(qkv.dtype.element_ty)
        for image in range(first, last):
            pair = (image * M + head) * A * D
            agents = tl.load(pooled + pair + place, mask=inside, other=0.0)
            values = tl.load(gathered + pair + place, mask=inside, other=0.0)
            dagents = tl.load(dpooled + pair + place, mask=inside, other=0.0)
            q = load_tile(qkv + image * batch + head * D, t, row, d, t < N, d < D)
            g = load_tile(grad + image * grad_batch + head * D, t, grad_row, d, t < N, d < D)
            p = choose(q, agents, tables, M, head, t, a, N, A, scale, BIAS2, BT, AP, IP)
            dp = tl.dot(g, tl.trans(values), input_precision=IP)
            ds = p * (dp - tl.sum(p * dp, 1)[:, None])
            if BIAS2:
                dtable += ds
            dq = tl.dot(ds.to(q.dtype), agents, input_precision=IP) * scale
            dq += tl.dot(within, dagents.to(q.dtype), input_precision=IP)
            tl.store(dqkv + image * N * 3 * C + out, dq.to(dqkv.dtype.element_ty), mask=kept)
        if BIAS2:
            table = ((2 * group + 1) * M + head) * (tl.cdiv(N, BT) * BT * AP)
            tl.store(dtables + table + t[:, None] * AP + a[None, :], dtable)
    else:
        dtable = tl.zeros([BT, AP], tl.float32)
        for image in range(first, last):
            pair = image * M + head
            agents = tl.load(pooled + pair * A * D + place, mask=inside, other=0.0)
            dvalues = tl.load(dgathered + pair * A * D + place, mask=inside, other=0.0).to(agents.dtype)
            log = tl.load(lse + pair * A + a, mask=a < A, other=0.0)
            total = tl.load(delta + pair * A + a, mask=a < A, other=0.0)
            x = qkv + image * batch + head * D
            k = load_tile(x + C, t, row, d, t < N, d < D)
            v = load_tile(x + 2 * C, t, row, d, t < N, d < D)
            s = tl.dot(k, tl.trans(agents), input_precision=IP) * (scale * LOG2E)
            if BIAS1:
                s += table_of(tables, 0, M, head, t[:, None], a[None, :], N, BT, AP)
            else:
                s = tl.where((t < N)[:, None], s, float("-inf"))
            p = tl.exp2(s - log[None, :])
            dp = tl.dot(v, tl.trans(dvalues), input_precision=IP)
            ds = p * (dp - total[None, :])
            if BIAS1:
                dtable += ds
            dk = tl.dot(ds.to(k.dtype), agents, input_precision=IP) * scale
            tl.store(dqkv + image * N * 3 * C + C + out, dk.to(dqkv.dtype.element_ty), mask=kept)
            dv = tl.dot(p.to(k.dtype), dvalues, input_precision=IP)
            if K > 0:
                g = grad + image * grad_batch + head * D
                dv += convolve(g, grad_row, taps + head * D, t, t < N, d, D, W, H, P, C, K, BT, DP, True)
            tl.store(dqkv + image * N * 3 * C + 2 * C + out, dv.to(dqkv.dtype.element_ty), mask=kept)
        if BIAS1:
            table = (2 * group * M + head) * (tl.cdiv(N, BT) * BT * AP)
            tl.store(dtables + table + t[:, None] * AP + a[None, :], dtable)


def image_groups(batch: int, heads: int, token_tiles: int, tables: bool) -> tuple[int, int]:
    """Groups of images, and images in each, for 8 programs per multiprocessor; without tables nothing is kept."""
    images = max(1, batch * 2 * heads * token_tiles // (8 * MULTIPROCESSORS)) if tables else 1
    return triton.cdiv(batch, images), images


def backward(
    grad: Tensor,
    qkv: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    gather: Tensor | None,
    scatter: Tensor | None,
    weight: Tensor | None,
    grid: tuple[int, int, int],
    heads: int,
    agents: tuple[int, int],
    scale: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, both tables, and weight and bias of the convolution; empty where there is none.

    Those of the convolution are empty too where neither is `needed`.
    """
    grad, qkv, (down, across) = rows(grad), rows(qkv), agents
    (B, N, C), A = grad.shape, down * across
    tile = tiles(N, A, C // heads, qkv.element_size(), backward=True)
    tables = padded_tables(qkv, gather, scatter, A, tile)
    strides = *grad.stride()[:2], *qkv.stride()[:2]
    flags = {"BIAS1": gather is not None, "BIAS2": scatter is not None}
    constants = {"D": C // heads, "DOWN": down, "ACROSS": across, **flags, **tile, "IP": precision(qkv.dtype)}
    state = _gradients_of_agents(grad, qkv, (tables, *saved), heads, scale, strides, grid[:2], constants)
    token_tiles = triton.cdiv(N, tile["BT"])
    groups, images = image_groups(B, heads, token_tiles, any(flags.values()))
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parts = saved[2].new_empty((groups, 2, heads, token_tiles * tile["BT"], tile["AP"]) if any(flags.values()) else 0)
    launch(
        _token_gradients, (groups * token_tiles * heads * 2,),
        grad, qkv, tables, taps_of(qkv, weight), *saved, *state, dqkv, parts,
        B, heads, *grid, N, scale, images, *strides,
        K=0 if weight is None else weight.shape[-1], stages=1, **constants,
    )  # fmt: skip
    dgather, dscatter = _folded(qkv, parts, gather, scatter, N, tile)
    if weight is None or not any(needed[3:]):
        return dqkv, dgather, dscatter, qkv.new_empty(0), qkv.new_empty(0)
    dweight, dbias = depthwise_conv.weight_gradient(grad, qkv[..., 2 * C :], weight, grid)
    return dqkv, dgather, dscatter, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _gradients_of_agents(grad, qkv, known, heads, scale, strides, grid, constants) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of V_A, and of the agents for each token in their bins, (B, M, A, D); sums (B, M, A) for softmax."""
    (B, N, _), lse, shape = grad.shape, known[-1], known[1].shape
    pairs = B * heads
    count, share = splits(pairs, N, constants["BT"])
    dtype = qkv.dtype if count == 1 else torch.float32
    dgathered = torch.empty(count, *shape, dtype=dtype, device=qkv.device)
    dpooled = torch.empty(2 * count if count > 1 else 1, *shape, dtype=dtype, device=qkv.device)
    delta, sizes = lse.new_empty((count, *lse.shape)), (pairs, heads, *grid, N, scale, share)

    def run(values: Tensor, agents: Tensor, **sides: bool) -> None:
        launch(
            _agent_gradients, (pairs, count), grad, qkv, *known, values, agents, delta, *sizes, *strides,
            stages=1 if constants["warps"] == 8 else 2, **sides, **constants,
        )  # fmt: skip

    if count == 1:
        run(dgathered, dpooled, QUERIES=True, KEYS=True)
        return dgathered, dpooled, delta
    run(dgathered, dpooled, QUERIES=True, KEYS=False)
    dgathered = dgathered.sum(0).to(qkv.dtype)
    run(dgathered, dpooled[count:], QUERIES=False, KEYS=True)
    return dgathered, dpooled.sum(0).to(qkv.dtype), delta


def _folded(
    qkv: Tensor, parts: Tensor, gather: Tensor | None, scatter: Tensor | None, tokens: int, tile: dict
) -> tuple[Tensor, Tensor]:
    """The gradients of both tables from those of groups of images; empty where there is none."""
    dgather, dscatter = (
        qkv.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (gather, scatter)
    )
    if gather is not None or scatter is not None:
        groups, _, heads = parts.shape[:3]
        launch(
            _fold, (triton.cdiv(tokens, tile["BT"]) * heads,), parts, dgather, dscatter, groups, heads, tokens,
            A=gather.shape[1] if scatter is None else scatter.shape[2], BT=tile["BT"], AP=tile["AP"],
            BIAS1=gather is not None, BIAS2=scatter is not None, warps=8,
        )  # fmt: skip
    return dgather, dscatter
