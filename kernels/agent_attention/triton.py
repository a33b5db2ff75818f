"""Triton kernels of `kernels.agent_attention`: forward and backward without atomics.

Forward: one launch up to 256 tokens, two above, four where there are few images. A program per image and head pools the
agents, gathers V_A with an online softmax over tiles of tokens and, on small maps, answers the tokens too. Larger maps
are answered by a program per tile of tokens; where there are few images, the gathering is split over tokens as well and
combined in a fixed order. Pooling and its transpose are products with a matrix of zeros and ones, made from positions.

Backward: two launches, three where there are few images. First the gradients of V_A and of the agents, a program per
image and head. Then those of the tokens: a program owns a tile of tokens and a head, goes through a group of images,
and keeps the gradient of its piece of a bias table in registers: a partial table per group instead of one per image.

With bias tables one launch more in front, which pads them, and one behind the backward pass, which adds up the groups;
with a convolution the weights are transposed first, and their gradient is that of `kernels.depthwise_conv.triton`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise_conv import triton as depthwise_conv
from kernels.device.launch import launch, power_of_2, precision, rows

WHOLE = 256  # tokens up to which one program does everything for an image and a head


@triton.jit
def _load(x, row, t, d, N, D):
    """Tokens t and channels d of one head; zero outside."""
    return tl.load(x + t[:, None] * row + d[None, :], mask=(t < N)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _tables(b1, b2, tables, M, N, b1_head, b1_agent, b1_token, b2_head, b2_agent, b2_token,
            A: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, BT: tl.constexpr, AP: tl.constexpr):  # fmt: skip
    """Both bias tables, in units of log 2, as (2, M, tokens, agents) filled up to whole tiles.

    The other kernels read them 128 bits at a time and without a mask. Tokens that fill B1 and agents that fill B2 have
    minus infinity; the rest of the filling is finite.
    """
    head = tl.program_id(0) % M
    t = tl.program_id(0) // M * BT + tl.arange(0, BT)
    a = tl.arange(0, AP)
    inside = (t < N)[:, None] & (a < A)[None, :]
    size = tl.cdiv(N, BT) * BT * AP
    place = t[:, None] * AP + a[None, :]
    if BIAS1:
        b = tl.load(b1 + head * b1_head + a[None, :] * b1_agent + t[:, None] * b1_token, mask=inside, other=0.0)
        b = tl.where((t < N)[:, None], b.to(tl.float32) * 1.4426950408889634, float("-inf"))
        tl.store(tables + head * size + place, b.to(tables.dtype.element_ty))
    if BIAS2:
        b = tl.load(b2 + head * b2_head + a[None, :] * b2_agent + t[:, None] * b2_token, mask=inside, other=0.0)
        b = tl.where((a < A)[None, :], b.to(tl.float32) * 1.4426950408889634, float("-inf"))
        tl.store(tables + (M + head) * size + place, b.to(tables.dtype.element_ty))


@triton.jit
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


@triton.jit
def _table(tables, which, M, head, t, a, N, BT: tl.constexpr, AP: tl.constexpr):
    """A piece of a table; a and t are shaped to broadcast."""
    size = tl.cdiv(N, BT) * BT * AP
    return tl.load(tables + (which * M + head) * size + t * AP + a).to(tl.float32)


@triton.jit
def _bin(a, H, W, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """First row, row after the last, first column and column after the last of the tokens that agent a averages."""
    i = a // ACROSS
    j = a % ACROSS
    return i * H // DOWN, ((i + 1) * H + DOWN - 1) // DOWN, j * W // ACROSS, ((j + 1) * W + ACROSS - 1) // ACROSS


@triton.jit
def _within(a, t, H, W, P, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """Whether token t is in the bin of agent a; a and t are shaped to broadcast."""
    top, bottom, left, right = _bin(a, H, W, DOWN, ACROSS)
    y = (t - P) // W
    x = (t - P) % W
    return (t >= P) & (y >= top) & (y < bottom) & (x >= left) & (x < right)


@triton.jit
def _tokens_in_bin(a, H, W, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    top, bottom, left, right = _bin(a, H, W, DOWN, ACROSS)
    return ((bottom - top) * (right - left)).to(tl.float32)


@triton.jit
def _convolve(x, row, taps, count, t, d, first, H, W, P, N, C, D, K: tl.constexpr, FLIP: tl.constexpr):
    """The depth-wise convolution of the map x at tokens t, its transpose with FLIP; zero for prefix tokens."""
    y = (t - P) // W
    col = (t - P) % W
    acc = tl.zeros([t.shape[0], d.shape[0]], tl.float32)
    for tap in range(count):  # k² as a constant would unroll the loop, and the loads of all taps take registers
        dy = (K // 2 - tap // K) if FLIP else (tap // K - K // 2)
        dx = (K // 2 - tap % K) if FLIP else (tap % K - K // 2)
        seen = (t >= P) & (t < N) & (y + dy >= 0) & (y + dy < H) & (col + dx >= 0) & (col + dx < W)
        place = (t + dy * W + dx)[:, None] * row + d[None, :]
        value = tl.load(x + place, mask=seen[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        w = tl.load(taps + tap * C + first + d, mask=d < D, other=0.0).to(tl.float32)
        acc += value * w[None, :]
    return acc


@triton.jit
def _choice(q, agents, tables, M, head, t, a, N, A, scale, BIAS: tl.constexpr, BT: tl.constexpr, AP: tl.constexpr,
            IP: tl.constexpr):  # fmt: skip
    """softmax(Q Aᵀ · scale + B2) of a tile, (tokens, agents)."""
    s = tl.dot(q, tl.trans(agents), input_precision=IP) * (scale * 1.4426950408889634)
    if BIAS:
        s += _table(tables, 1, M, head, t[:, None], a[None, :], N, BT, AP)
    else:
        s = tl.where((a < A)[None, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * (1.0 / tl.sum(p, 1))[:, None]


@triton.jit
def _answer(
    qkv, row, tables, taps, count, conv_bias, out, agents, gathered, t, a, d, head, M, H, W, P, N, A, scale,
    D: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr, CONV_BIAS: tl.constexpr, BT: tl.constexpr, AP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """What a tile of tokens reads from the agents, and the convolution of the values there."""
    q = _load(qkv, row, t, d, N, D)
    p = _choice(q, agents, tables, M, head, t, a, N, A, scale, BIAS, BT, AP, IP)
    o = tl.dot(p.to(gathered.dtype), gathered, input_precision=IP)
    if K > 0:
        o += _convolve(qkv + 2 * M * D, row, taps, count, t, d, head * D, H, W, P, N, M * D, D, K, False)
        if CONV_BIAS:
            b = tl.load(conv_bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)
            o += tl.where((t >= P)[:, None], b[None, :], 0.0)
    place = t[:, None] * (M * D) + d[None, :]
    tl.store(out + place, o.to(out.dtype.element_ty), mask=(t < N)[:, None] & (d < D)[None, :])


@triton.jit
def _pool(qkv, pooled, M, H, W, P, batch, row, D: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
          BT: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """One agent: the mean of its bin."""
    a = tl.program_id(0) % (DOWN * ACROSS)
    pair = (tl.program_id(0) // (DOWN * ACROSS)).to(tl.int64)
    d = tl.arange(0, DP)
    top, bottom, left, right = _bin(a, H, W, DOWN, ACROSS)
    qkv += pair // M * batch + pair % M * D
    acc = tl.zeros([BT, DP], tl.float32)
    for start in range(0, (bottom - top) * (right - left), BT):
        i = start + tl.arange(0, BT)
        y = top + i // (right - left)
        x = left + i % (right - left)
        inside = (y < bottom)[:, None] & (d < D)[None, :]
        acc += tl.load(qkv + (P + y * W + x)[:, None] * row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(acc, 0) / ((bottom - top) * (right - left)).to(tl.float32)
    tl.store(pooled + (pair * (DOWN * ACROSS) + a) * D + d, mean.to(pooled.dtype.element_ty), mask=d < D)


@triton.jit
def _gather(
    qkv, tables, taps, count, conv_bias, pooled, gathered, lse, out, pairs, M, H, W, P, N, scale, share, batch, row,
    D: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, POOL: tl.constexpr, ANSWER: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, K: tl.constexpr, CONV_BIAS: tl.constexpr,
    BT: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """V_A of one image and head over a share of the tokens; with POOL the agents first, with ANSWER the tokens last."""
    A: tl.constexpr = DOWN * ACROSS
    pair = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % M
    a = tl.arange(0, AP)
    d = tl.arange(0, DP)
    C = M * D
    inside = (a < A)[:, None] & (d < D)[None, :]
    place = a[:, None] * D + d[None, :]
    qkv += pair // M * batch + head * D
    pooled += pair * A * D
    if POOL:
        total = tl.zeros([AP, DP], tl.float32)
        for start in range(0, N, BT):
            t = start + tl.arange(0, BT)
            q = _load(qkv, row, t, d, N, D)
            within = _within(a[:, None], t[None, :], H, W, P, DOWN, ACROSS)
            total += tl.dot(within.to(q.dtype), q, input_precision=IP)
        agents = (total / _tokens_in_bin(a, H, W, DOWN, ACROSS)[:, None]).to(pooled.dtype.element_ty)
        tl.store(pooled + place, agents, mask=inside)
    else:
        agents = tl.load(pooled + place, mask=inside, other=0.0)
    highest = tl.full([AP], float("-inf"), tl.float32)
    weights = tl.zeros([AP], tl.float32)
    acc = tl.zeros([AP, DP], tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, N), BT):
        t = start + tl.arange(0, BT)
        k = _load(qkv + C, row, t, d, N, D)
        s = tl.dot(agents, tl.trans(k), input_precision=IP) * (scale * 1.4426950408889634)
        if BIAS1:
            s += _table(tables, 0, M, head, t[None, :], a[:, None], N, BT, AP)
        else:
            s = tl.where((t < N)[None, :], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(highest - base)
        weights = weights * shrink + tl.sum(p, 1)
        v = _load(qkv + 2 * C, row, t, d, N, D)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IP)
        highest = higher
    acc = acc * (1.0 / weights)[:, None]
    # one result per share of the tokens
    pair += tl.program_id(1).to(tl.int64) * pairs
    tl.store(gathered + pair * A * D + place, acc.to(gathered.dtype.element_ty), mask=inside)
    tl.store(lse + pair * A + a, highest + tl.log2(weights), mask=a < A)
    if ANSWER:
        out += tl.program_id(0).to(tl.int64) // M * N * C + head * D
        values = acc.to(agents.dtype)
        for start in range(0, N, BT):
            t = start + tl.arange(0, BT)
            _answer(
                qkv, row, tables, taps, count, conv_bias, out, agents, values, t, a, d, head, M, H, W, P, N, A, scale,
                D, BIAS2, K, CONV_BIAS, BT, AP, IP,
            )  # fmt: skip


@triton.jit
def _combine(parts, part_lse, gathered, lse, pairs, splits, D: tl.constexpr, A: tl.constexpr, AP: tl.constexpr,
             DP: tl.constexpr):  # fmt: skip
    """V_A from the results over shares of the tokens, each weighted by what its softmax would have had in the whole."""
    pair = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, AP)
    d = tl.arange(0, DP)
    inside = (a < A)[:, None] & (d < D)[None, :]
    place = a[:, None] * D + d[None, :]
    highest = tl.full([AP], float("-inf"), tl.float32)
    weights = tl.zeros([AP], tl.float32)
    acc = tl.zeros([AP, DP], tl.float32)
    for split in range(splits):
        at = pair + split * pairs
        part = tl.load(parts + at * A * D + place, mask=inside, other=0.0)
        log = tl.load(part_lse + at * A + a, mask=a < A, other=0.0)
        higher = tl.maximum(highest, log)
        shrink = tl.exp2(highest - higher)
        share = tl.exp2(log - higher)
        weights = weights * shrink + share
        acc = acc * shrink[:, None] + part * share[:, None]
        highest = higher
    acc = acc / weights[:, None]
    tl.store(gathered + pair * A * D + place, acc.to(gathered.dtype.element_ty), mask=inside)
    tl.store(lse + pair * A + a, highest + tl.log2(weights), mask=a < A)


@triton.jit
def _scatter(
    qkv, tables, taps, count, conv_bias, pooled, gathered, out, M, H, W, P, N, scale, batch, row,
    D: tl.constexpr, A: tl.constexpr, BIAS2: tl.constexpr, K: tl.constexpr, CONV_BIAS: tl.constexpr,
    BT: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The answers to one tile of tokens; heads of the same tokens next to each other, as in memory."""
    head = tl.program_id(0) % M
    tile = tl.program_id(0) // M
    tiles = tl.cdiv(N, BT)
    image = (tile // tiles).to(tl.int64)
    t = tile % tiles * BT + tl.arange(0, BT)
    a = tl.arange(0, AP)
    d = tl.arange(0, DP)
    inside = (a < A)[:, None] & (d < D)[None, :]
    place = (image * M + head) * A * D + a[:, None] * D + d[None, :]
    agents = tl.load(pooled + place, mask=inside, other=0.0)
    values = tl.load(gathered + place, mask=inside, other=0.0)
    _answer(
        qkv + image * batch + head * D, row, tables, taps, count, conv_bias, out + image * N * M * D + head * D,
        agents, values, t, a, d, head, M, H, W, P, N, A, scale, D, BIAS2, K, CONV_BIAS, BT, AP, IP,
    )  # fmt: skip


@triton.jit
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
            q = _load(qkv, row, t, d, N, D)
            g = _load(grad, grad_row, t, d, N, D)
            p = _choice(q, agents, tables, M, head, t, a, N, A, scale, BIAS2, BT, AP, IP)
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
        total = tl.sum(dv.to(tl.float32) * values.to(tl.float32), 1)
        log = tl.load(lse + pair * A + a, mask=a < A, other=0.0)
        tl.store(delta + part * A + a, total, mask=a < A)
        for start in range(first, last, BT):
            t = start + tl.arange(0, BT)
            k = _load(qkv + C, row, t, d, N, D)
            v = _load(qkv + 2 * C, row, t, d, N, D)
            s = tl.dot(agents, tl.trans(k), input_precision=IP) * (scale * 1.4426950408889634)
            if BIAS1:
                s += _table(tables, 0, M, head, t[None, :], a[:, None], N, BT, AP)
            else:
                s = tl.where((t < N)[None, :], s, float("-inf"))
            p = tl.exp2(s - log[:, None])
            dp = tl.dot(dv, tl.trans(v), input_precision=IP)
            dagents += tl.dot((p * (dp - total[:, None])).to(k.dtype), k, input_precision=IP)
    dagents = dagents * (scale / _tokens_in_bin(a, H, W, DOWN, ACROSS))[:, None]
    tl.store(dpooled + part * A * D + place, dagents.to(dpooled.dtype.element_ty), mask=inside)


@triton.jit
def _token_gradients(
    grad, qkv, tables, taps, count, pooled, gathered, lse, dgathered, dpooled, delta, dqkv, dtables,
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
        within = _within(a[None, :], t[:, None], H, W, P, DOWN, ACROSS).to(qkv.dtype.element_ty)
        for image in range(first, last):
            pair = (image * M + head) * A * D
            agents = tl.load(pooled + pair + place, mask=inside, other=0.0)
            values = tl.load(gathered + pair + place, mask=inside, other=0.0)
            dagents = tl.load(dpooled + pair + place, mask=inside, other=0.0)
            q = _load(qkv + image * batch + head * D, row, t, d, N, D)
            g = _load(grad + image * grad_batch + head * D, grad_row, t, d, N, D)
            p = _choice(q, agents, tables, M, head, t, a, N, A, scale, BIAS2, BT, AP, IP)
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
            k = _load(x + C, row, t, d, N, D)
            v = _load(x + 2 * C, row, t, d, N, D)
            s = tl.dot(k, tl.trans(agents), input_precision=IP) * (scale * 1.4426950408889634)
            if BIAS1:
                s += _table(tables, 0, M, head, t[:, None], a[None, :], N, BT, AP)
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
                dv += _convolve(g, grad_row, taps, count, t, d, head * D, H, W, P, N, C, D, K, True)
            tl.store(dqkv + image * N * 3 * C + 2 * C + out, dv.to(dqkv.dtype.element_ty), mask=kept)
        if BIAS1:
            table = (2 * group * M + head) * (tl.cdiv(N, BT) * BT * AP)
            tl.store(dtables + table + t[:, None] * AP + a[None, :], dtable)


def tiles(tokens: int, agents: int, head_dim: int, itemsize: int, *, backward: bool = False) -> dict:
    """Tokens, agents and channels of a tile, and warps.

    64 tokens are what a tensor core of sm_90 takes at once. Half where a program would not hold a row of tiles in its
    registers: wide agents or heads, float32, and in the backward pass already from 64 agents with 64 channels.
    """
    AP, DP = power_of_2(agents), power_of_2(head_dim)
    wide = max(AP, DP) > 64
    BT = 128 // itemsize // (2 if wide else 1) // (2 if backward and not wide and AP + DP > 96 else 1)
    return {"BT": min(max(BT, 16), power_of_2(tokens)), "AP": AP, "DP": DP, "warps": 8 if wide else 4}


def splits(pairs: int, tokens: int, tile: int) -> tuple[int, int]:
    """Over how many programs the tokens of an image and head are split, and the tokens of each of them.

    One where one program does everything, or where images and heads already fill a large GPU twice; else enough to
    fill it four times, each with at least two tiles.
    """
    if tokens <= WHOLE or pairs >= 264:
        return 1, tokens
    count = max(1, min(triton.cdiv(528, max(pairs, 1)), tokens // (2 * tile)))
    share = triton.cdiv(triton.cdiv(tokens, tile), count) * tile
    return triton.cdiv(tokens, share), share


def image_groups(batch: int, heads: int, token_tiles: int, tables: bool) -> tuple[int, int]:
    """Groups of images, and images in each: about 1056 programs; without tables nothing is kept between images."""
    images = max(1, batch * 2 * heads * token_tiles // 1056) if tables else 1
    return triton.cdiv(batch, images), images


def forward(
    qkv: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    grid: tuple[int, int, int],
    heads: int,
    agents: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result (B, N, C); for the backward pass the agents and V_A (B, M, A, D), and their log-sum-exp, base 2."""
    qkv, (H, W, P), (down, across) = rows(qkv), grid, agents
    (B, N, C), A = (qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3), down * across
    D, pairs = C // heads, B * heads
    tile = tiles(N, A, D, qkv.element_size())
    count, share = splits(pairs, N, tile["BT"])
    out = torch.empty(B, N, C, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, heads, A, dtype=torch.float32, device=qkv.device)
    gathered = torch.empty(B, heads, A, D, dtype=qkv.dtype, device=qkv.device)
    pooled, parts, part_lse = torch.empty_like(gathered), gathered, lse
    if count > 1:
        parts, part_lse = lse.new_empty((count, *gathered.shape)), lse.new_empty((count, *lse.shape))
        launch(
            _pool, (pairs * A,), qkv, pooled, heads, H, W, P, qkv.stride(0), qkv.stride(1),
            D=D, DOWN=down, ACROSS=across, BT=4096 // tile["DP"], DP=tile["DP"],
        )  # fmt: skip
    local = *_taps(qkv, weight), (qkv if bias is None else bias.contiguous())
    answer = {
        "BIAS2": scatter is not None, "K": 0 if weight is None else weight.shape[-1], "CONV_BIAS": bias is not None,
        "D": D, "IP": precision(qkv.dtype), **tile,
    }  # fmt: skip
    tables = _padded_tables(qkv, gather, scatter, A, tile)
    sizes = heads, H, W, P, N, scale
    launch(
        _gather, (pairs, count), qkv, tables, *local, pooled, parts, part_lse, out, pairs, *sizes, share,
        qkv.stride(0), qkv.stride(1),
        DOWN=down, ACROSS=across, POOL=count == 1, BIAS1=gather is not None, ANSWER=N <= WHOLE, **answer,
    )  # fmt: skip
    if count > 1:
        launch(_combine, (pairs,), parts, part_lse, gathered, lse, pairs, count, D=D, A=A, AP=tile["AP"], DP=tile["DP"])
    if N > WHOLE:
        launch(
            _scatter, (B * triton.cdiv(N, tile["BT"]) * heads,), qkv, tables, *local, pooled, gathered, out,
            *sizes, qkv.stride(0), qkv.stride(1), A=A, **answer,
        )  # fmt: skip
    return out, pooled, gathered, lse


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, both tables, and weight and bias of the convolution; empty where there is none."""
    grad, qkv, (down, across) = rows(grad), rows(qkv), agents
    (B, N, C), A = grad.shape, down * across
    tile = tiles(N, A, C // heads, qkv.element_size(), backward=True)
    tables = _padded_tables(qkv, gather, scatter, A, tile)
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
        grad, qkv, tables, *_taps(qkv, weight), *saved, *state, dqkv, parts,
        B, heads, *grid, N, scale, images, *strides,
        K=0 if weight is None else weight.shape[-1], stages=1, **constants,
    )  # fmt: skip
    dgather, dscatter = _folded(qkv, parts, gather, scatter, N, tile)
    if weight is None:
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


def _padded_tables(qkv: Tensor, gather: Tensor | None, scatter: Tensor | None, agents: int, tile: dict) -> Tensor:
    """What `_tables` makes, in the dtype of qkv as the reference takes them; something harmless without tables."""
    if gather is None and scatter is None:
        return qkv
    heads, N = (gather.shape[0], gather.shape[2]) if gather is not None else scatter.shape[:2]
    count = triton.cdiv(N, tile["BT"])
    tables = torch.empty(2, heads, count * tile["BT"], tile["AP"], dtype=qkv.dtype, device=qkv.device)
    b1, b2 = qkv if gather is None else gather, qkv if scatter is None else scatter.mT
    launch(
        _tables, (count * heads,), b1, b2, tables, heads, N, *b1.stride(), *b2.stride(),
        A=agents, BIAS1=gather is not None, BIAS2=scatter is not None, BT=tile["BT"], AP=tile["AP"],
    )  # fmt: skip
    return tables


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


def _taps(qkv: Tensor, weight: Tensor | None) -> tuple[Tensor, int]:
    """The weights (k·k, C), and k·k; something harmless without."""
    return (qkv, 0) if weight is None else (weight.flatten(1).t().contiguous(), weight.shape[-1] ** 2)
