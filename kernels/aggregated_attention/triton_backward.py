"""Backward of `kernels.aggregated_attention` in four passes, without atomics.

Weights are recomputed from the logarithm of their sum. Queries, keys and values of the map, those of the pooled map,
and the bias each belong to the programs of one pass: a key gathers from the queries that see it. Sums over more than a
program are written as shares and added up in PyTorch, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregated_attention.triton import (
    SMALLEST,
    around,
    constants_of,
    contiguous,
    direction,
    load_bias,
    load_learned,
    load_vector,
    local_logits,
    log_of_keys,
    tiles_of,
    tokens_of_tile,
    unit,
    with_column,
    with_local,
)
from kernels.device.launch import launch, partial_sums, rows, turns
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E


@triton.jit
def _before_unit(unit, inverse, grad):
    """The gradient of x from that of x̂; rows of a norm below the smallest were only divided by it."""
    along = tl.where(inverse < 1.0 / SMALLEST, tl.sum(unit * grad, 1), 0.0)
    return (grad - unit * along[:, None]) * inverse[:, None]


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
            v, _there = around(values, j, token, y, x, inside, row, H, W, D, BD, WINDOW)
            w = with_column(w, j, tl.sum(do.to(tl.float32) * v.to(tl.float32), 1))
    return w


@triton.jit
def _pooled(
    raised, reach, do, kv_pool, pool_bias, token, inside, p, P, C, pool_row, D: tl.constexpr, BD: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """k̂ of a block of pooled tokens, the logits to it in base 2, and the products of the gradient with its values."""
    k = direction(load_rows(kv_pool, p, pool_row, p < P, D, BD))
    v = load_rows(kv_pool + C, p, pool_row, p < P, D, BD)
    s = tl.dot(raised, tl.trans(k), input_precision=IP) * (reach * LOG2E)[:, None]
    s = tl.where((p < P)[None, :], s + load_bias(pool_bias, token, p, inside, P), float("-inf"))
    return k, s, tl.dot(do, tl.trans(v), input_precision=IP)


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
    added = load_vector(embedding + first, D, BD)
    temperature = tl.load(scale + head).to(tl.float32)
    y, x, inside = tokens_of_tile(tile, H, W, BY, BX)
    token = y * W + x
    base = qkv + image * batch + first
    kv_pool += image * pool_batch + first
    place = (image * M + head) * (H * W) + token
    q, inverse = unit(load_rows(base, token, row, inside, D, BD))
    do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
    # +inf makes the weights of queries that are not in the map zero
    log = tl.load(lse + place, mask=inside, other=float("inf"))
    raised = q + added[None, :]
    log_keys = log_of_keys(y, x, H, W, P, R)
    reach = temperature * log_keys
    s = local_logits(raised, reach, base + C, local_bias + head * T, token, y, x, inside, row, H, W, D, BD, BT, WINDOW)
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
    by_tokens = tl.dot(w, tl.trans(load_learned(tokens, head, D, T, BD, BT)), input_precision=IP)
    gate = tl.full([BM], 1.0, tl.float32)
    if GATES:
        where = (image * (H * W) + token) * M + head
        gate = tl.load(gates + where, mask=inside, other=0.0).to(tl.float32)
        dgate = mean + tl.sum(q * by_tokens, 1) + tl.sum(w * load_vector(token_bias + head * T, T, BT)[None, :], 1)
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
    store_rows(shares, t, D, t < T, tl.dot(tl.trans(w), q, input_precision=IP), D, BD)
    change = tl.zeros([BM, BD], tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        k, s_p, w_p = _pooled(raised, reach, do, kv_pool, pool_bias, token, inside, p, P, C, pool_row, D, BD, IP)
        ds_p = tl.exp2(s_p - log[:, None]) * (w_p - mean[:, None]) * (gate * share)[:, None]
        change += tl.dot(ds_p, k, input_precision=IP)
    change = with_local(change, ds, base + C, token, y, x, inside, row, H, W, D, BD, WINDOW, True)
    tl.store(sums + 2 * T, tl.sum(tl.sum(change * raised, 1) * log_keys, 0))
    change *= reach[:, None]
    d = tl.arange(0, BD)
    tl.store(shares + T * D + d, tl.sum(change, 0), mask=d < D)
    dq = _before_unit(q, inverse, change + by_tokens * gate[:, None])
    store_rows(dqkv + image * (3 * H * W * C) + first, token, 3 * C, inside, dq, D, BD)


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
    y, x, inside = tokens_of_tile(tile, H, W, BY, BX)
    token = y * W + x
    k, inverse = unit(load_rows(base + C, token, row, inside, D, BD))
    v = load_rows(base + 2 * C, token, row, inside, D, BD).to(tl.float32)
    added = load_vector(embedding + first, D, BD)
    temperature = tl.load(scale + head).to(tl.float32)
    d = tl.arange(0, BD)
    dk = tl.zeros([BY * BX, BD], tl.float32)
    dv = tl.zeros([BY * BX, BD], tl.float32)
    for dy in range(WINDOW):
        for dx in tl.static_range(WINDOW):
            j = dy * WINDOW + dx  # of the token, seen from the query
            i = token - (dy - R) * W - (dx - R)
            q, there = around(base, T - 1 - j, token, y, x, inside, row, H, W, D, BD, WINDOW)
            q = direction(q)
            do = load_rows(grad, i, grad_row, there, D, BD).to(tl.float32)
            log = tl.load(lse + i, mask=there, other=float("inf"))
            mean = tl.load(delta + i, mask=there, other=0.0)
            reach = temperature * log_of_keys(y - dy + R, x - dx + R, H, W, P, R)
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
    store_rows(to + C, token, 3 * C, inside, _before_unit(k, inverse, dk), D, BD)
    store_rows(to + 2 * C, token, 3 * C, inside, dv, D, BD)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
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
    k, inverse = unit(load_rows(pool, p, pool_row, p < P, D, BD))
    v = load_rows(pool + C, p, pool_row, p < P, D, BD)
    added = load_vector(embedding + first, D, BD)
    temperature = tl.load(scale + head).to(tl.float32)
    dk = tl.zeros([BP, BD], tl.float32)
    dv = tl.zeros([BP, BD], tl.float32)
    for turn in range(0, turns):
        tile = split + turn * splits
        y, x, inside = tokens_of_tile(tile, H, W, BY, BX)
        inside = inside & (tile < tiles)
        token = y * W + x
        q = direction(load_rows(qkv + image * batch + first, token, row, inside, D, BD))
        do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
        place = (image * M + head) * (H * W) + token
        log = tl.load(lse + place, mask=inside, other=float("inf"))
        mean = tl.load(delta + place, mask=inside, other=0.0)
        reach = temperature * log_of_keys(y, x, H, W, P, WINDOW // 2)
        raised = q + added[None, :]
        s = tl.dot(k, tl.trans(raised), input_precision=IP) * (reach * LOG2E)[None, :]
        s += tl.trans(load_bias(pool_bias, token, p, inside, P))
        a = tl.exp2(tl.where((p < P)[:, None], s, float("-inf")) - log[None, :])
        if GATES:
            gate = tl.load(gates + (image * (H * W) + token) * M + head, mask=inside, other=0.0)
            a *= gate.to(tl.float32)[None, :]
        ds = a * (tl.dot(v, tl.trans(do), input_precision=IP) - mean[None, :])
        dk += tl.dot(ds * reach[None, :], raised, input_precision=IP)
        dv += tl.dot(a.to(do.dtype), do, input_precision=IP)
    # (splits, B, P, 2 C)
    to = shares + (split.to(tl.int64) * B + image) * P * (2 * C) + first
    store_rows(to, p, 2 * C, p < P, _before_unit(k, inverse, dk), D, BD)
    store_rows(to + C, p, 2 * C, p < P, dv, D, BD)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
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
    y, x, in_map = tokens_of_tile(tile, H, W, BY, BX)
    token = y * W + x
    added = load_vector(embedding + first, D, BD)
    reach = tl.load(scale + head).to(tl.float32) * log_of_keys(y, x, H, W, P, WINDOW // 2)
    total = tl.zeros([BY * BX, BP], tl.float32)
    for turn in range(0, turns):
        image = (split + turn * splits).to(tl.int64)
        inside = in_map & (image < B)
        q = direction(load_rows(qkv + image * batch + first, token, row, inside, D, BD))
        do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
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


def backward(
    grad: Tensor, qkv: Tensor, kv_pool: Tensor, parameters: tuple, lse: Tensor, grid: tuple[int, int], window: int
) -> tuple[Tensor, ...]:
    """Gradients of qkv, kv_pool and the parameters; an empty one for gates that are None."""
    grad, qkv, kv_pool, given = rows(grad), rows(qkv), rows(kv_pool), contiguous(parameters, qkv)
    scale, embedding, local_bias, pool_bias, tokens, token_bias, gates = given
    B, M, gated = qkv.shape[0], scale.shape[0], parameters[-1] is not None
    dqkv, delta = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkv, lse))
    dgates = torch.empty(gates.shape if gated else 0, dtype=gates.dtype, device=gates.device)
    sizes = (M, *grid, kv_pool.shape[1], *grad.stride()[:2], *qkv.stride()[:2])
    pooled_sizes = (*sizes, *kv_pool.stride()[:2])
    constants = constants_of(qkv, M, grid, window, gated)
    # writes delta, which the other passes read
    tensors = (grad, qkv, kv_pool, *given, lse, delta, dqkv, dgates)
    learned = _backward_of_queries(tensors, B, pooled_sizes, constants)
    launch(
        _backward_keys, (B * tiles_of(grid, constants) * M,), grad, qkv, scale, embedding, local_bias, tokens,
        token_bias, gates, lse, delta, dqkv, *sizes,
        **{name: c for name, c in constants.items() if name not in ("BP", "BT", "IP")},
    )  # fmt: skip
    dkv_pool, dpool_bias = _backward_of_pool(
        (grad, qkv, kv_pool, scale, embedding, pool_bias, gates, lse, delta), B, pooled_sizes,
        constants_of(qkv, M, grid, window, gated, pooled=True),
    )  # fmt: skip
    dtokens, dembedding, dlocal_bias, dtoken_bias, dscale = learned
    gradients = (dkv_pool, dscale, dembedding, dlocal_bias, dpool_bias, dtokens, dtoken_bias)
    wanted = (kv_pool, *parameters[:-1])
    return dqkv, *(g.to(t.dtype) for g, t in zip(gradients, wanted, strict=True)), dgates


def _backward_of_queries(tensors: tuple, B: int, sizes: tuple, constants: dict) -> tuple[Tensor, ...]:
    """Writes dq, delta and the gradient of the gates; the gradients of learned tokens, query embedding, local bias,
    bias of the learned tokens and scale, in float32."""
    M, T, programs = sizes[0], constants["WINDOW"] ** 2, B * tiles_of(sizes[1:3], constants)
    shares = partial_sums(tensors[0], programs, M, T + 1, constants["D"])
    sums = partial_sums(tensors[0], programs, M, 2 * T + 1)
    launch(_backward_queries, (programs * M,), *tensors, shares, sums, *sizes, **constants)
    rows_MTD, scalars = shares.sum(0), sums.sum(0)
    parts = (rows_MTD[:, :T].mT, rows_MTD[:, T], scalars[:, :T], scalars[:, T : 2 * T], scalars[:, 2 * T])
    # operators must not return views of one another
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)


def _backward_of_pool(tensors: tuple, B: int, sizes: tuple, constants: dict) -> tuple[Tensor, Tensor]:
    """The gradients of the pooled tokens and of the bias to them, in float32."""
    M, H, W, P, *_ = sizes
    tiles, blocks = tiles_of((H, W), constants), triton.cdiv(P, constants["BP"])
    each = turns(B * blocks * M * tiles, tiles)
    splits = triton.cdiv(tiles, each)
    dkv = partial_sums(tensors[0], splits, B, P, 2 * M * constants["D"])
    launch(_backward_pool, (splits * B * blocks * M,), *tensors, dkv, each, B, *sizes, **constants)
    each = turns(B * tiles * blocks * M, B)
    splits = triton.cdiv(B, each)
    dbias = partial_sums(tensors[0], splits, M, H * W, P)
    launch(_backward_bias, (splits * tiles * blocks * M,), *tensors, dbias, each, B, *sizes, **constants)
    return dkv.sum(0), dbias.sum(0)
