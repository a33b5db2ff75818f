"""Triton kernels of `kernels.aggregated_attention`: forward, and backward in four passes without atomics.

A program takes one head and a tile of the map, BY × BX tokens, so that neighbours are mostly its own tokens: they are
read by shifted addresses, once per offset, from the cache. Logits of the T neighbours are the columns of one small
tensor, which lets them join the softmax of the pooled tokens, whose logits are matrix products in blocks of BP.

Backward recomputes the weights from the logarithm of their sum. Queries, keys and values of the map, those of the
pooled map, and the bias each belong to the programs of one pass: a key gathers from the queries that see it. Sums over
more than a program are written as shares and added up in PyTorch, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregated_attention.constants import EPSILON
from kernels.device.launch import launch, power_of_2, precision, rows

LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(EPSILON)


@triton.jit
def _tokens(tile, H, W, BY: tl.constexpr, BX: tl.constexpr):
    """Row and column of the tokens of a tile, and whether they are in the map."""
    r = tl.arange(0, BY * BX)
    across = tl.cdiv(W, BX)
    y = tile // across * BY + r // BX
    x = tile % across * BX + r % BX
    return y, x, (y < H) & (x < W)


@triton.jit
def _load(base, token, row, inside, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(base + token[:, None] * row + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(base, token, row, inside, x, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    to = base + token[:, None] * row + d[None, :]
    tl.store(to, x.to(base.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _inverse(x):
    """1/‖x‖ of rows in float32."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), SMALLEST)


@triton.jit
def _direction(x):
    """x̂ of rows, in float32."""
    x = x.to(tl.float32)
    return x * _inverse(x)[:, None]


@triton.jit
def _unit(x):
    """x̂ and 1/‖x‖ of rows, in float32."""
    x = x.to(tl.float32)
    inverse = _inverse(x)
    return x * inverse[:, None], inverse


@triton.jit
def _before_unit(unit, inverse, grad):
    """The gradient of x from that of x̂; rows of a norm below the smallest were only divided by it."""
    along = tl.where(inverse < 1.0 / SMALLEST, tl.sum(unit * grad, 1), 0.0)
    return (grad - unit * along[:, None]) * inverse[:, None]


@triton.jit
def _log_keys(y, x, H, W, P, R: tl.constexpr):
    """log(n): neighbours of (y, x) in the map, and pooled tokens. Finite for any y and x."""
    down = tl.maximum(tl.minimum(y + R, H - 1) - tl.maximum(y - R, 0) + 1, 0)
    across = tl.maximum(tl.minimum(x + R, W - 1) - tl.maximum(x - R, 0) + 1, 0)
    return tl.log((down * across + P).to(tl.float32))


@triton.jit
def _vector(base, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(base + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _learned(tokens, head, D: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """The learned tokens of a head, (BD, BT)."""
    d = tl.arange(0, BD)
    t = tl.arange(0, BT)
    at = tokens + (head * D + d[:, None]) * T + t[None, :]
    return tl.load(at, mask=(d < D)[:, None] & (t < T)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _column(x, j):
    """x[:, j]"""
    t = tl.arange(0, x.shape[1])
    return tl.sum(tl.where(t[None, :] == j, x, 0.0), 1)


@triton.jit
def _with_column(x, j, column):
    t = tl.arange(0, x.shape[1])
    return tl.where(t[None, :] == j, column[:, None], x)


@triton.jit
def _around(base, j, token, y, x, inside, row, H, W, D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr):
    """Neighbour j of every token of a tile, and whether it is in the map."""
    dy = j // WINDOW - WINDOW // 2
    dx = j % WINDOW - WINDOW // 2
    there = inside & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
    return _load(base, token + dy * W + dx, row, there, D, BD), there


# Neighbours come a row of the window at a time: all of them at once would take too many registers.


@triton.jit
def _local_logits(
    raised, reach, keys, local_bias, token, y, x, inside, row, H, W,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """s of the neighbours in base 2, one column each; -inf outside of the map."""
    s = tl.full([raised.shape[0], BT], float("-inf"), tl.float32)
    for i in range(WINDOW):
        for dx in tl.static_range(WINDOW):
            j = i * WINDOW + dx
            k, there = _around(keys, j, token, y, x, inside, row, H, W, D, BD, WINDOW)
            k = k.to(tl.float32)
            bias = tl.load(local_bias + j).to(tl.float32) * LOG2E
            s_j = tl.sum(raised * k, 1) * (_inverse(k) * reach * LOG2E) + bias
            s = _with_column(s, j, tl.where(there, s_j, float("-inf")))
    return s


@triton.jit
def _local_products(
    do, values, token, y, x, inside, row, H, W,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """do·v of the neighbours, one column each."""
    w = tl.zeros([do.shape[0], BT], tl.float32)
    for i in range(WINDOW):
        for dx in tl.static_range(WINDOW):
            j = i * WINDOW + dx
            v, _there = _around(values, j, token, y, x, inside, row, H, W, D, BD, WINDOW)
            w = _with_column(w, j, tl.sum(do.to(tl.float32) * v.to(tl.float32), 1))
    return w


@triton.jit
def _with_local(
    o, weight, values, token, y, x, inside, row, H, W,
    D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """o plus the neighbours times the columns of `weight`; UNIT takes their directions."""
    for i in range(WINDOW):
        for dx in tl.static_range(WINDOW):
            j = i * WINDOW + dx
            v, _there = _around(values, j, token, y, x, inside, row, H, W, D, BD, WINDOW)
            v = v.to(tl.float32)
            weight_j = _column(weight, j)
            if UNIT:
                weight_j *= _inverse(v)
            o += weight_j[:, None] * v
    return o


@triton.jit
def _bias(pool_bias, token, p, inside, P):
    """B of tokens and pooled tokens in base 2; 0 where there are none."""
    mask = inside[:, None] & (p < P)[None, :]
    return tl.load(pool_bias + token[:, None] * P + p[None, :], mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _pooled(
    raised, reach, do, kv_pool, pool_bias, token, inside, p, P, C, pool_row, D: tl.constexpr, BD: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """k̂ of a block of pooled tokens, the logits to it in base 2, and the products of the gradient with its values."""
    k = _direction(_load(kv_pool, p, pool_row, p < P, D, BD))
    v = _load(kv_pool + C, p, pool_row, p < P, D, BD)
    s = tl.dot(raised, tl.trans(k), input_precision=IP) * (reach * LOG2E)[:, None]
    s = tl.where((p < P)[None, :], s + _bias(pool_bias, token, p, inside, P), float("-inf"))
    return k, s, tl.dot(do, tl.trans(v), input_precision=IP)


@triton.jit
def _forward(
    qkv, kv_pool, scale, embedding, local_bias, pool_bias, tokens, token_bias, gates, out, lse,
    M, H, W, P, batch, row, pool_batch, pool_row,
    D: tl.constexpr, WINDOW: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, GATES: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WINDOW * WINDOW
    R: tl.constexpr = WINDOW // 2
    BM: tl.constexpr = BY * BX
    C = M * D
    head = tl.program_id(0) % M
    tiles = tl.cdiv(H, BY) * tl.cdiv(W, BX)
    tile = tl.program_id(0) // M % tiles
    image = (tl.program_id(0) // M // tiles).to(tl.int64)
    first = head * D
    base = qkv + image * batch + first
    kv_pool += image * pool_batch + first
    pool_bias += head.to(tl.int64) * (H * W) * P
    y, x, inside = _tokens(tile, H, W, BY, BX)
    token = y * W + x
    q = _direction(_load(base, token, row, inside, D, BD))
    raised = q + _vector(embedding + first, D, BD)[None, :]
    reach = tl.load(scale + head).to(tl.float32) * _log_keys(y, x, H, W, P, R)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BD], tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        k = _direction(_load(kv_pool, p, pool_row, p < P, D, BD))
        v = _load(kv_pool + C, p, pool_row, p < P, D, BD)
        s = tl.dot(raised, tl.trans(k), input_precision=IP) * (reach * LOG2E)[:, None]
        s = tl.where((p < P)[None, :], s + _bias(pool_bias, token, p, inside, P), float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        kept = tl.exp2(top - higher)
        a = tl.exp2(s - higher[:, None])
        total = total * kept + tl.sum(a, 1)
        o = o * kept[:, None] + tl.dot(a.to(v.dtype), v, input_precision=IP)
        top = higher
    s = _local_logits(raised, reach, base + C, local_bias + head * T, token, y, x, inside, row, H, W, D, BD, BT, WINDOW)
    higher = tl.maximum(top, tl.max(s, 1))
    kept = tl.exp2(top - higher)
    a = tl.exp2(s - higher[:, None])
    total = total * kept + tl.sum(a, 1)
    learned = tl.dot(q, _learned(tokens, head, D, T, BD, BT), input_precision=IP)
    learned += _vector(token_bias + head * T, T, BT)[None, :]
    weight = a / total[:, None] + learned
    o *= (kept / total)[:, None]
    o = _with_local(o, weight, base + 2 * C, token, y, x, inside, row, H, W, D, BD, WINDOW, False)
    if GATES:
        gate = tl.load(gates + (image * (H * W) + token) * M + head, mask=inside, other=0.0)
        o *= gate.to(tl.float32)[:, None]
    _store(out + image * (H * W * C) + first, token, C, inside, o, D, BD)
    tl.store(lse + (image * M + head) * (H * W) + token, higher + tl.log2(total), mask=inside)


@triton.jit
def _backward_queries(
    grad, qkv, kv_pool, scale, embedding, local_bias, pool_bias, tokens, token_bias, gates, lse, delta, dqkv, dgates,
    shares, sums, M, H, W, P, grad_batch, grad_row, batch, row, pool_batch, pool_row,
    D: tl.constexpr, WINDOW: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, GATES: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dq and the gradient of the gates; delta = Σ a (v·do) for the other passes; shares of what is learned per head."""
    T: tl.constexpr = WINDOW * WINDOW
    R: tl.constexpr = WINDOW // 2
    BM: tl.constexpr = BY * BX
    C = M * D
    head = tl.program_id(0) % M
    tiles = tl.cdiv(H, BY) * tl.cdiv(W, BX)
    tile = tl.program_id(0) // M % tiles
    image = (tl.program_id(0) // M // tiles).to(tl.int64)
    first = head * D
    pool_bias += head.to(tl.int64) * (H * W) * P
    added = _vector(embedding + first, D, BD)
    temperature = tl.load(scale + head).to(tl.float32)
    y, x, inside = _tokens(tile, H, W, BY, BX)
    token = y * W + x
    base = qkv + image * batch + first
    kv_pool += image * pool_batch + first
    place = (image * M + head) * (H * W) + token
    q, inverse = _unit(_load(base, token, row, inside, D, BD))
    do = _load(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
    # +inf makes the weights of queries that are not in the map zero
    log = tl.load(lse + place, mask=inside, other=float("inf"))
    raised = q + added[None, :]
    log_keys = _log_keys(y, x, H, W, P, R)
    reach = temperature * log_keys
    s = _local_logits(raised, reach, base + C, local_bias + head * T, token, y, x, inside, row, H, W, D, BD, BT, WINDOW)
    w = _local_products(do, base + 2 * C, token, y, x, inside, row, H, W, D, BD, BT, WINDOW)
    # weights that sum to exactly one, as the logarithm of their sum is rounded
    a = tl.exp2(s - log[:, None])
    total = tl.sum(a, 1)
    mean = tl.sum(a * w, 1)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        k, s_p, w_p = _pooled(raised, reach, do, kv_pool, pool_bias, token, inside, p, P, C, pool_row, D, BD, IP)
        a_p = tl.exp2(s_p - log[:, None])
        total += tl.sum(a_p, 1)
        mean += tl.sum(a_p * w_p, 1)
    share = 1.0 / tl.where(inside, total, 1.0)
    mean *= share
    tl.store(delta + place, mean, mask=inside)
    by_tokens = tl.dot(w, tl.trans(_learned(tokens, head, D, T, BD, BT)), input_precision=IP)
    gate = tl.full([BM], 1.0, tl.float32)
    if GATES:
        where = (image * (H * W) + token) * M + head
        gate = tl.load(gates + where, mask=inside, other=0.0).to(tl.float32)
        dgate = mean + tl.sum(q * by_tokens, 1) + tl.sum(w * _vector(token_bias + head * T, T, BT)[None, :], 1)
        tl.store(dgates + where, dgate.to(dgates.dtype.element_ty), mask=inside)
    w *= gate[:, None]
    ds = a * share[:, None] * (w - (gate * mean)[:, None])
    # (B · tiles, M, T + 1, D): learned tokens, and the query embedding; (B · tiles, M, 2 T + 1): biases and scale
    t = tl.arange(0, BT)
    part = (tl.program_id(0) // M).to(tl.int64) * M + head
    shares += part * ((T + 1) * D)
    sums += part * (2 * T + 1)
    tl.store(sums + t, tl.sum(ds, 0), mask=t < T)
    tl.store(sums + T + t, tl.sum(w, 0), mask=t < T)
    _store(shares, t, D, t < T, tl.dot(tl.trans(w), q, input_precision=IP), D, BD)
    change = tl.zeros([BM, BD], tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        k, s_p, w_p = _pooled(raised, reach, do, kv_pool, pool_bias, token, inside, p, P, C, pool_row, D, BD, IP)
        ds_p = tl.exp2(s_p - log[:, None]) * (w_p - mean[:, None]) * (gate * share)[:, None]
        change += tl.dot(ds_p, k, input_precision=IP)
    change = _with_local(change, ds, base + C, token, y, x, inside, row, H, W, D, BD, WINDOW, True)
    tl.store(sums + 2 * T, tl.sum(tl.sum(change * raised, 1) * log_keys, 0))
    change *= reach[:, None]
    d = tl.arange(0, BD)
    tl.store(shares + T * D + d, tl.sum(change, 0), mask=d < D)
    dq = _before_unit(q, inverse, change + by_tokens * gate[:, None])
    _store(dqkv + image * (3 * H * W * C) + first, token, 3 * C, inside, dq, D, BD)


@triton.jit
def _backward_keys(
    grad, qkv, scale, embedding, local_bias, tokens, token_bias, gates, lse, delta, dqkv,
    M, H, W, P, grad_batch, grad_row, batch, row,
    D: tl.constexpr, WINDOW: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BD: tl.constexpr,
    GATES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of tokens, from the queries that have them as neighbours."""
    T: tl.constexpr = WINDOW * WINDOW
    R: tl.constexpr = WINDOW // 2
    C = M * D
    head = tl.program_id(0) % M
    tiles = tl.cdiv(H, BY) * tl.cdiv(W, BX)
    tile = tl.program_id(0) // M % tiles
    image = (tl.program_id(0) // M // tiles).to(tl.int64)
    first = head * D
    base = qkv + image * batch + first
    grad += image * grad_batch + first
    lse += (image * M + head) * (H * W)
    delta += (image * M + head) * (H * W)
    gates += image * (H * W * M) + head
    y, x, inside = _tokens(tile, H, W, BY, BX)
    token = y * W + x
    k, inverse = _unit(_load(base + C, token, row, inside, D, BD))
    v = _load(base + 2 * C, token, row, inside, D, BD).to(tl.float32)
    added = _vector(embedding + first, D, BD)
    temperature = tl.load(scale + head).to(tl.float32)
    d = tl.arange(0, BD)
    dk = tl.zeros([BY * BX, BD], tl.float32)
    dv = tl.zeros([BY * BX, BD], tl.float32)
    for dy in range(WINDOW):
        for dx in tl.static_range(WINDOW):
            j = dy * WINDOW + dx  # of the token, seen from the query
            i = token - (dy - R) * W - (dx - R)
            q, there = _around(base, T - 1 - j, token, y, x, inside, row, H, W, D, BD, WINDOW)
            q = _direction(q)
            do = _load(grad, i, grad_row, there, D, BD).to(tl.float32)
            log = tl.load(lse + i, mask=there, other=float("inf"))
            mean = tl.load(delta + i, mask=there, other=0.0)
            reach = temperature * _log_keys(y - dy + R, x - dx + R, H, W, P, R)
            raised = q + added[None, :]
            s = tl.sum(raised * k, 1) * (reach * LOG2E) + tl.load(local_bias + head * T + j).to(tl.float32) * LOG2E
            a = tl.exp2(s - log)
            ds = a * (tl.sum(do * v, 1) - mean)
            learned = tl.load(tokens + (head * D + d) * T + j, mask=d < D, other=0.0).to(tl.float32)
            weight = a + tl.sum(q * learned[None, :], 1) + tl.load(token_bias + head * T + j).to(tl.float32)
            if GATES:
                gate = tl.load(gates + i * M, mask=there, other=0.0).to(tl.float32)
                ds *= gate
                weight *= gate
            dk += (ds * reach)[:, None] * raised
            dv += weight[:, None] * do
    to = dqkv + image * (3 * H * W * C) + first
    _store(to + C, token, 3 * C, inside, _before_unit(k, inverse, dk), D, BD)
    _store(to + 2 * C, token, 3 * C, inside, dv, D, BD)


@triton.jit
def _backward_pool(
    grad, qkv, kv_pool, scale, embedding, pool_bias, gates, lse, delta, shares,
    turns, B, M, H, W, P, grad_batch, grad_row, batch, row, pool_batch, pool_row,
    D: tl.constexpr, WINDOW: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    GATES: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of the pooled tokens of an image, from every `splits`-th tile of its queries."""
    C = M * D
    blocks = tl.cdiv(P, BP)
    head = tl.program_id(0) % M
    block = tl.program_id(0) // M % blocks
    image = (tl.program_id(0) // M // blocks % B).to(tl.int64)
    split = tl.program_id(0) // M // blocks // B
    splits = tl.num_programs(0) // M // blocks // B
    tiles = tl.cdiv(H, BY) * tl.cdiv(W, BX)
    first = head * D
    pool = kv_pool + image * pool_batch + first
    pool_bias += head.to(tl.int64) * (H * W) * P
    p = block * BP + tl.arange(0, BP)
    k, inverse = _unit(_load(pool, p, pool_row, p < P, D, BD))
    v = _load(pool + C, p, pool_row, p < P, D, BD)
    added = _vector(embedding + first, D, BD)
    temperature = tl.load(scale + head).to(tl.float32)
    dk = tl.zeros([BP, BD], tl.float32)
    dv = tl.zeros([BP, BD], tl.float32)
    for turn in range(0, turns):
        tile = split + turn * splits
        y, x, inside = _tokens(tile, H, W, BY, BX)
        inside = inside & (tile < tiles)
        token = y * W + x
        q = _direction(_load(qkv + image * batch + first, token, row, inside, D, BD))
        do = _load(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        place = (image * M + head) * (H * W) + token
        log = tl.load(lse + place, mask=inside, other=float("inf"))
        mean = tl.load(delta + place, mask=inside, other=0.0)
        reach = temperature * _log_keys(y, x, H, W, P, WINDOW // 2)
        raised = q + added[None, :]
        s = tl.dot(k, tl.trans(raised), input_precision=IP) * (reach * LOG2E)[None, :]
        s += tl.trans(_bias(pool_bias, token, p, inside, P))
        a = tl.exp2(tl.where((p < P)[:, None], s, float("-inf")) - log[None, :])
        if GATES:
            gate = tl.load(gates + (image * (H * W) + token) * M + head, mask=inside, other=0.0)
            a *= gate.to(tl.float32)[None, :]
        ds = a * (tl.dot(v, tl.trans(do), input_precision=IP) - mean[None, :])
        dk += tl.dot(ds * reach[None, :], raised, input_precision=IP)
        dv += tl.dot(a.to(do.dtype), do, input_precision=IP)
    # (splits, B, P, 2 C)
    to = shares + (split.to(tl.int64) * B + image) * P * (2 * C) + first
    _store(to, p, 2 * C, p < P, _before_unit(k, inverse, dk), D, BD)
    _store(to + C, p, 2 * C, p < P, dv, D, BD)


@triton.jit
def _backward_bias(
    grad, qkv, kv_pool, scale, embedding, pool_bias, gates, lse, delta, shares,
    turns, B, M, H, W, P, grad_batch, grad_row, batch, row, pool_batch, pool_row,
    D: tl.constexpr, WINDOW: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    GATES: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The gradient of the bias from a tile of tokens to a block of pooled tokens, over every `splits`-th image."""
    C = M * D
    blocks = tl.cdiv(P, BP)
    tiles = tl.cdiv(H, BY) * tl.cdiv(W, BX)
    head = tl.program_id(0) % M
    block = tl.program_id(0) // M % blocks
    tile = tl.program_id(0) // M // blocks % tiles
    split = tl.program_id(0) // M // blocks // tiles
    splits = tl.num_programs(0) // M // blocks // tiles
    first = head * D
    pool_bias += head.to(tl.int64) * (H * W) * P
    p = block * BP + tl.arange(0, BP)
    y, x, in_map = _tokens(tile, H, W, BY, BX)
    token = y * W + x
    added = _vector(embedding + first, D, BD)
    reach = tl.load(scale + head).to(tl.float32) * _log_keys(y, x, H, W, P, WINDOW // 2)
    total = tl.zeros([BY * BX, BP], tl.float32)
    for turn in range(0, turns):
        image = (split + turn * splits).to(tl.int64)
        inside = in_map & (image < B)
        q = _direction(_load(qkv + image * batch + first, token, row, inside, D, BD))
        do = _load(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        pool = kv_pool + tl.minimum(image, B - 1) * pool_batch + first
        place = (image * M + head) * (H * W) + token
        log = tl.load(lse + place, mask=inside, other=float("inf"))
        mean = tl.load(delta + place, mask=inside, other=0.0)
        raised = q + added[None, :]
        _k, s, w = _pooled(raised, reach, do, pool, pool_bias, token, inside, p, P, C, pool_row, D, BD, IP)
        ds = tl.exp2(s - log[:, None]) * (w - mean[:, None])
        if GATES:
            gate = tl.load(gates + (image * (H * W) + token) * M + head, mask=inside, other=0.0)
            ds *= gate.to(tl.float32)[:, None]
        total += ds
    # (splits, M, N, P)
    to = shares + (split.to(tl.int64) * M + head) * (H * W) * P + token[:, None] * P + p[None, :]
    tl.store(to, total, mask=in_map[:, None] & (p < P)[None, :])


def shape_of_tile(grid: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Rows and columns of a tile: the shape that covers the map with the fewest, the squarest of those."""
    across = 1 << (tokens.bit_length() // 2)
    shapes = [(tokens // side, side) for side in (across, across // 2, across * 2)]
    return min(shapes, key=lambda shape: triton.cdiv(grid[0], shape[0]) * triton.cdiv(grid[1], shape[1]))


def turns(work: int, most: int) -> int:
    """Pieces of work for each program: few enough to leave 8 programs per multiprocessor of a large GPU."""
    return max(1, min(most, work // 1056))


def forward(
    qkv: Tensor, kv_pool: Tensor, parameters: tuple, grid: tuple[int, int], window: int
) -> tuple[Tensor, Tensor]:
    """The output (B, N, C), and the logarithm of the sum of each softmax, (B, M, N) in base 2."""
    qkv, kv_pool, given = rows(qkv), rows(kv_pool), _contiguous(parameters, qkv)
    (B, N, _), M, P = qkv.shape, given[0].shape[0], kv_pool.shape[1]
    out = torch.empty(B, N, qkv.shape[2] // 3, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, M, N, dtype=torch.float32, device=qkv.device)
    constants = _constants(qkv, M, grid, window, parameters[-1] is not None)
    launch(
        _forward, (B * _tiles(grid, constants) * M,), qkv, kv_pool, *given, out, lse, M, *grid, P,
        *qkv.stride()[:2], *kv_pool.stride()[:2], **constants,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, kv_pool: Tensor, parameters: tuple, lse: Tensor, grid: tuple[int, int], window: int
) -> tuple[Tensor, ...]:
    """Gradients of qkv, kv_pool and the parameters; an empty one for gates that are None."""
    grad, qkv, kv_pool, given = rows(grad), rows(qkv), rows(kv_pool), _contiguous(parameters, qkv)
    scale, embedding, local_bias, pool_bias, tokens, token_bias, gates = given
    B, M, gated = qkv.shape[0], scale.shape[0], parameters[-1] is not None
    dqkv, delta = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkv, lse))
    dgates = torch.empty(gates.shape if gated else 0, dtype=gates.dtype, device=gates.device)
    sizes = (M, *grid, kv_pool.shape[1], *grad.stride()[:2], *qkv.stride()[:2])
    pooled_sizes = (*sizes, *kv_pool.stride()[:2])
    constants = _constants(qkv, M, grid, window, gated)
    # writes delta, which the other passes read
    tensors = (grad, qkv, kv_pool, *given, lse, delta, dqkv, dgates)
    learned = _backward_of_queries(tensors, B, pooled_sizes, constants)
    launch(
        _backward_keys, (B * _tiles(grid, constants) * M,), grad, qkv, scale, embedding, local_bias, tokens, token_bias,
        gates, lse, delta, dqkv, *sizes, **{name: c for name, c in constants.items() if name not in ("BP", "BT", "IP")},
    )  # fmt: skip
    dkv_pool, dpool_bias = _backward_of_pool(
        (grad, qkv, kv_pool, scale, embedding, pool_bias, gates, lse, delta), B, pooled_sizes,
        _constants(qkv, M, grid, window, gated, pooled=True),
    )  # fmt: skip
    dtokens, dembedding, dlocal_bias, dtoken_bias, dscale = learned
    gradients = (dkv_pool, dscale, dembedding, dlocal_bias, dpool_bias, dtokens, dtoken_bias)
    wanted = (kv_pool, *parameters[:-1])
    return dqkv, *(g.to(t.dtype) for g, t in zip(gradients, wanted, strict=True)), dgates


def _backward_of_queries(tensors: tuple, B: int, sizes: tuple, constants: dict) -> tuple[Tensor, ...]:
    """Writes dq, delta and the gradient of the gates; the gradients of learned tokens, query embedding, local bias,
    bias of the learned tokens and scale, in float32."""
    M, T, programs = sizes[0], constants["WINDOW"] ** 2, B * _tiles(sizes[1:3], constants)
    shares = _shares(tensors[0], programs, M, T + 1, constants["D"])
    sums = _shares(tensors[0], programs, M, 2 * T + 1)
    launch(_backward_queries, (programs * M,), *tensors, shares, sums, *sizes, **constants)
    rows_MTD, scalars = shares.sum(0), sums.sum(0)
    parts = (rows_MTD[:, :T].mT, rows_MTD[:, T], scalars[:, :T], scalars[:, T : 2 * T], scalars[:, 2 * T])
    # operators must not return views of one another
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)


def _backward_of_pool(tensors: tuple, B: int, sizes: tuple, constants: dict) -> tuple[Tensor, Tensor]:
    """The gradients of the pooled tokens and of the bias to them, in float32."""
    M, H, W, P, *_ = sizes
    tiles, blocks = _tiles((H, W), constants), triton.cdiv(P, constants["BP"])
    each = turns(B * blocks * M * tiles, tiles)
    splits = triton.cdiv(tiles, each)
    dkv = _shares(tensors[0], splits, B, P, 2 * M * constants["D"])
    launch(_backward_pool, (splits * B * blocks * M,), *tensors, dkv, each, B, *sizes, **constants)
    each = turns(B * tiles * blocks * M, B)
    splits = triton.cdiv(B, each)
    dbias = _shares(tensors[0], splits, M, H * W, P)
    launch(_backward_bias, (splits * tiles * blocks * M,), *tensors, dbias, each, B, *sizes, **constants)
    return dkv.sum(0), dbias.sum(0)


def _shares(like: Tensor, *shape: int) -> Tensor:
    """What programs add to a sum, each in its own place."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _contiguous(parameters: tuple, instead: Tensor) -> tuple[Tensor, ...]:
    return tuple(instead if p is None else p.contiguous() for p in parameters)


def _tiles(grid: tuple[int, int], constants: dict) -> int:
    return triton.cdiv(grid[0], constants["BY"]) * triton.cdiv(grid[1], constants["BX"])


def _constants(qkv: Tensor, M: int, grid: tuple[int, int], window: int, gated: bool, *, pooled: bool = False) -> dict:
    """Constants of a kernel, and its warps and stages; `pooled` for the passes over pooled tokens and their bias.

    Tiles are so large that nothing is spilled on sm_80 and sm_90: products of float32 are plain multiplications, whose
    operands take more registers, and logits of many pooled tokens at once take the place of tokens of the map.
    """
    D = qkv.shape[2] // (3 * M)
    BD, IP = power_of_2(D), precision(qkv.dtype)
    exact, width = IP == "ieee", max(BD, 32)
    BY, BX = shape_of_tile(grid, max(16, (2048 >> exact + pooled) // width))
    BP = max(16, (2048 >> 2 * exact if pooled else 1024) // width)
    constants = {"D": D, "WINDOW": window, "GATES": gated, "IP": IP, "BY": BY, "BX": BX, "BP": BP, "BD": BD}
    if not pooled:
        constants["BT"] = power_of_2(window**2)
    return constants | {"warps": 4 if pooled else 8, "stages": 1}
