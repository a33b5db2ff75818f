"""Backward of `kernels.aggregated_attention` in four passes, without atomics.

Weights are recomputed from the logarithm of their sum. The pass over the queries writes what it found for each of their
neighbours, a weight and a slope (the gradient of its product), of which keys and values then take what is theirs. The
pooled tokens and the bias to them each have a pass of their own, in the file beside. Sums over more than a program are
written as shares and added up in PyTorch, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregated_attention.patches import (
    CELLS,
    along,
    along_directions,
    blocks_of_patches,
    class_of_offset,
    corners_of_patches,
    gathered,
    halves,
    load_halos,
    neighbours_in_map,
    offset_of_class,
    product_of_halves,
    tokens_of_halos,
    tokens_of_patches,
)
from kernels.aggregated_attention.triton import (
    SMALLEST,
    blocks_of,
    constants_of,
    direction,
    inverse_norm,
    load_learned,
    load_vector,
    log_of_keys,
    prepared,
    products_of_learned,
)
from kernels.aggregated_attention.triton_pool import backward_of_bias, backward_of_pool, before_unit, pooled
from kernels.device.launch import launch, partial_sums, rows
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E


@triton.jit
def _backward_queries(
    grad, qkv, kv_pool, scale, embedding, local_bias, pool_bias, tokens, token_bias, gates, lse, delta, inverses,
    weights, slopes, dqkv, dgates, shares, sums,
    M, H, W, P, bias_row, grad_batch, grad_row, batch, row, pool_batch, pool_row,
    D: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, BP: tl.constexpr,
    BD: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, ALIGN: tl.constexpr, GATES: tl.constexpr, IP: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    """dq and the gradient of the gates; delta = Σ a (v·do), 1/‖q‖, and a weight and a slope for each neighbour, for the
    other passes; shares of what is learned per head."""
    T: tl.constexpr = WINDOW * WINDOW
    G: tl.constexpr = GY * GX
    BM: tl.constexpr = G * CELLS
    C = M * D
    batch, row = batch // ALIGN * ALIGN, row // ALIGN * ALIGN
    grad_batch, grad_row = grad_batch // ALIGN * ALIGN, grad_row // ALIGN * ALIGN
    pool_batch, pool_row = pool_batch // ALIGN * ALIGN, pool_row // ALIGN * ALIGN
    head = tl.program_id(0) % M
    blocks = blocks_of_patches(H, W, GY, GX)
    block = tl.program_id(0) // M % blocks
    image = (tl.program_id(0) // M // blocks).to(tl.int64)
    first = head * D
    pool_bias += head.to(tl.int64) * (H * W) * bias_row
    base = qkv + image * batch + first
    grad += image * grad_batch + first
    kv_pool += image * pool_batch + first
    # (B, M, N): the numbers of this head
    place = (image * M + head) * (H * W)
    lse, delta, inverses = lse + place, delta + place, inverses + place
    gates, dgates = gates + image * (H * W * M) + head, dgates + image * (H * W * M) + head
    top, left = corners_of_patches(block, W, GY, GX)
    y, x, inside = tokens_of_patches(top, left, H, W)
    token = y * W + x
    raw = load_rows(base, token, row, inside, D, BD)
    inverse = inverse_norm(raw)
    tl.store(inverses + token, inverse, mask=inside)
    do = load_rows(grad, token, grad_row, inside, D, BD)
    # +inf makes the weights of queries that are not in the map zero
    log = tl.load(lse + token, mask=inside, other=float("inf"))
    q = raw.to(tl.float32) * inverse[:, None]
    high, low = halves(q + load_vector(embedding + first, D, BD)[None, :], raw.dtype)
    log_keys = log_of_keys(y, x, H, W, P, WINDOW // 2)
    reach = tl.load(scale + head).to(tl.float32) * log_keys
    steep = reach * LOG2E
    # neighbours, a column for each class
    near, there = tokens_of_halos(top, left, H, W, WINDOW, HALO, BH)
    k = load_halos(base + C, near, row, there, D, BD)
    high_of_patch, low_of_patch = tl.reshape(high, (G, CELLS, BD)), tl.reshape(low, (G, CELLS, BD))
    inverse_k = inverse_norm(k)
    s = product_of_halves(high_of_patch, low_of_patch, tl.permute(k, (0, 2, 1)), IP) * inverse_k[:, None, :]
    dy, dx = offset_of_class(WINDOW, BM, BT)
    seen = neighbours_in_map(y, x, inside, dy, dx, H, W, WINDOW, BT)
    bias = tl.load(local_bias + head * T + dy * WINDOW + dx, mask=seen, other=float("-inf")).to(tl.float32)
    product = gathered(s, WINDOW, HALO, BT, IP)
    # weights that sum to exactly one, as the logarithm of their sum is rounded
    a = tl.exp2(product * steep[:, None] + bias * LOG2E - log[:, None])
    v = load_halos(base + 2 * C, near, row, there, D, BD)
    w = tl.dot(tl.reshape(do, (G, CELLS, BD)), tl.permute(v, (0, 2, 1)), input_precision=IP)
    w = gathered(w, WINDOW, HALO, BT, IP)
    k_pool, s, w_pool = pooled(
        high, low, steep, do, kv_pool, pool_bias, token, inside, 0, P, C, pool_row, bias_row, D, BP, BD, IP
    )
    a_pool = tl.exp2(s - log[:, None])
    total = tl.sum(a, 1) + tl.sum(a_pool, 1)
    mean = tl.sum(a * w, 1) + tl.sum(a_pool * w_pool, 1)
    for start in range(BP, P if MORE else BP, BP):
        _k, s, w_p = pooled(
            high, low, steep, do, kv_pool, pool_bias, token, inside, start, P, C, pool_row, bias_row, D, BP, BD, IP
        )
        a_p = tl.exp2(s - log[:, None])
        total += tl.sum(a_p, 1)
        mean += tl.sum(a_p * w_p, 1)
    share = 1.0 / tl.where(inside, total, 1.0)
    mean *= share
    tl.store(delta + token, mean, mask=inside)
    gate = tl.full([BM], 1.0, tl.float32)
    if GATES:
        gate = tl.load(gates + token * M, mask=inside, other=0.0).to(tl.float32)
    gated = share * gate
    gated_mean = mean * gated
    ds_pool = a_pool * (w_pool * gated[:, None] - gated_mean[:, None])
    change = tl.dot(ds_pool.to(do.dtype), direction(k_pool).to(do.dtype), input_precision=IP)
    for start in range(BP, P if MORE else BP, BP):
        k_p, s, w_p = pooled(
            high, low, steep, do, kv_pool, pool_bias, token, inside, start, P, C, pool_row, bias_row, D, BP, BD, IP
        )
        ds_p = tl.exp2(s - log[:, None]) * (w_p * gated[:, None] - gated_mean[:, None])
        change = tl.dot(ds_p.to(do.dtype), direction(k_p).to(do.dtype), change, input_precision=IP)
    ds = a * (w * gated[:, None] - gated_mean[:, None])
    change_of_scale = tl.sum(tl.sum(ds * product, 1) * log_keys, 0)
    # read again, as keeping them would take the registers of the pooled tokens' weights
    k = load_halos(base + C, near, row, there, D, BD)
    raw = load_rows(base, token, row, inside, D, BD)
    change = tl.reshape(change, (G, CELLS, BD))
    change = along_directions(ds, k, inverse_k, change, WINDOW, HALO, IP)
    change = tl.reshape(change, (BM, BD))
    # neighbours in the order of the window
    by_offset = class_of_offset(WINDOW, BM, BT)
    t = tl.arange(0, BT)
    real = (t < T)[None, :]
    slope = tl.gather(ds * reach[:, None], by_offset, 1)
    ds = tl.where(real, tl.gather(ds, by_offset, 1), 0.0)
    w = tl.where(real, tl.gather(w, by_offset, 1), 0.0)
    weight = tl.gather(a * share[:, None], by_offset, 1)
    learned = load_learned(tokens, head, BD, BT)
    added = products_of_learned(raw, inverse, learned, IP) + load_vector(token_bias + head * T, T, BT)[None, :]
    weight = (weight + added) * gate[:, None]
    if GATES:
        dgate = mean + tl.sum(w * added, 1)
        tl.store(dgates + token * M, dgate.to(dgates.dtype.element_ty), mask=inside)
    w *= gate[:, None]
    # (B, M, N, T): weights, and gradients of the products of queries and keys
    at = token[:, None] * T + t[None, :]
    tl.store(weights + place * T + at, weight, mask=inside[:, None] & real)
    tl.store(slopes + place * T + at, slope, mask=inside[:, None] & real)
    # (B · blocks, M, T + 1, D): learned tokens, and the query embedding; (B · blocks, M, 2 T + 1): biases and scale
    part = (tl.program_id(0) // M).to(tl.int64) * M + head
    shares += part * ((T + 1) * D)
    sums += part * (2 * T + 1)
    tl.store(sums + t, tl.sum(ds, 0), mask=t < T)
    tl.store(sums + T + t, tl.sum(w, 0), mask=t < T)
    q = raw.to(tl.float32) * inverse[:, None]
    dtokens = tl.dot(tl.trans(w.to(do.dtype)), q.to(do.dtype), input_precision=IP)
    store_rows(shares, t, D, t < T, dtokens, D, BD)
    tl.store(sums + 2 * T, change_of_scale)
    change *= reach[:, None]
    d = tl.arange(0, BD)
    tl.store(shares + T * D + d, tl.sum(change, 0), mask=d < D)
    change += tl.dot(w, tl.trans(learned), input_precision=IP)
    along = tl.where(inverse < 1.0 / SMALLEST, tl.sum(q * change, 1), 0.0)
    dq = (change - q * along[:, None]) * inverse[:, None]
    store_rows(dqkv + image * (3 * H * W * C) + first, token, 3 * C, inside, dq, D, BD)


@triton.jit
def _backward_keys(
    grad, qkv, embedding, inverses, weights, slopes, dqkv, M, H, W, grad_batch, grad_row, batch, row,
    D: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, ALIGN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dk and dv of G patches of tokens, from the queries that have them as neighbours."""
    T: tl.constexpr = WINDOW * WINDOW
    G: tl.constexpr = GY * GX
    BM: tl.constexpr = G * CELLS
    C = M * D
    batch, row = batch // ALIGN * ALIGN, row // ALIGN * ALIGN
    grad_batch, grad_row = grad_batch // ALIGN * ALIGN, grad_row // ALIGN * ALIGN
    head = tl.program_id(0) % M
    blocks = blocks_of_patches(H, W, GY, GX)
    block = tl.program_id(0) // M % blocks
    image = (tl.program_id(0) // M // blocks).to(tl.int64)
    first = head * D
    base = qkv + image * batch + first
    images = image * M + head
    top, left = corners_of_patches(block, W, GY, GX)
    near, there = tokens_of_halos(top, left, H, W, WINDOW, HALO, BH)
    q = load_halos(base, near, row, there, D, BD).to(tl.float32)
    q *= tl.load(inverses + images * (H * W) + near, mask=there, other=0.0)[:, :, None]
    do = load_halos(grad + image * grad_batch + first, near, grad_row, there, D, BD)
    raised = (q + load_vector(embedding + first, D, BD)[None, None, :]).to(do.dtype)
    y, x, inside = tokens_of_patches(top, left, H, W)
    token = y * W + x
    # the query of each class, and which of its neighbours this token is
    dy, dx = offset_of_class(WINDOW, BM, BT)
    seen = neighbours_in_map(y, x, inside, dy, dx, H, W, WINDOW, BT)
    query = token[:, None] + (dy - WINDOW // 2) * W + dx - WINDOW // 2
    at = images * (H * W) * T + query * T + (T - 1 - dy * WINDOW - dx)
    weight = tl.load(weights + at, mask=seen, other=0.0)
    ds = tl.load(slopes + at, mask=seen, other=0.0)
    zero = tl.zeros([G, CELLS, BD], tl.float32)
    dk = along(ds, raised, zero, WINDOW, HALO, IP)
    dv = along(weight, do, zero, WINDOW, HALO, IP)
    k = load_rows(base + C, token, row, inside, D, BD)
    to = dqkv + image * (3 * H * W * C) + first
    store_rows(to + C, token, 3 * C, inside, before_unit(k, tl.reshape(dk, (BM, BD))), D, BD)
    store_rows(to + 2 * C, token, 3 * C, inside, tl.reshape(dv, (BM, BD)), D, BD)


def backward(
    grad: Tensor,
    qkv: Tensor,
    kv_pool: Tensor,
    parameters: tuple,
    lse: Tensor,
    grid: tuple[int, int],
    window: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of qkv, kv_pool and the parameters; an empty one for gates that are None.

    Empty too are those of kv_pool and of the bias to it where they are not `needed`.
    """
    grad, qkv, kv_pool = rows(grad), rows(qkv), rows(kv_pool)
    B, M, gated = qkv.shape[0], parameters[0].shape[0], parameters[-1] is not None
    constants = constants_of((qkv, kv_pool, grad), M, grid, window, gated)
    given = prepared(parameters, qkv, constants)
    scale, embedding, _local_bias, pool_bias, _tokens, _token_bias, gates = given
    dqkv, delta, inverses = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qkv, lse, lse))
    # what the queries find for each of their neighbours
    weights, slopes = (torch.empty(*lse.shape, window**2, dtype=lse.dtype, device=lse.device) for _ in range(2))
    dgates = torch.empty(gates.shape if gated else 0, dtype=gates.dtype, device=gates.device)
    sizes = (M, *grid, kv_pool.shape[1], pool_bias.shape[2], *grad.stride()[:2], *qkv.stride()[:2])
    sizes = (*sizes, *kv_pool.stride()[:2])
    # writes delta, inverses, weights and slopes, which the other passes read
    tensors = (grad, qkv, kv_pool, *given, lse, delta, inverses, weights, slopes, dqkv, dgates)
    learned = _backward_of_queries(tensors, B, sizes, constants)
    if needed[0]:
        launch(
            _backward_keys, (B * blocks_of(grid, constants) * M,), grad, qkv, embedding, inverses, weights, slopes,
            dqkv, M, *grid, *grad.stride()[:2], *qkv.stride()[:2],
            **{name: c for name, c in constants.items() if name not in ("BP", "GATES")},
        )  # fmt: skip
    tensors = (grad, qkv, kv_pool, scale, embedding, pool_bias, gates, lse, delta)
    dkv_pool, dscale_of_pool = backward_of_pool(tensors, B, sizes, constants, any(needed[1:3]))
    dpool_bias = backward_of_bias(tensors, B, sizes, constants, needed[5])
    dtokens, dembedding, dlocal_bias, dtoken_bias, dscale = learned
    gradients = (dkv_pool, dscale + dscale_of_pool, dembedding, dlocal_bias, dpool_bias, dtokens, dtoken_bias)
    wanted = (kv_pool, *parameters[:-1])
    return dqkv, *(g.to(t.dtype) for g, t in zip(gradients, wanted, strict=True)), dgates


def _backward_of_queries(tensors: tuple, B: int, sizes: tuple, constants: dict) -> tuple[Tensor, ...]:
    """Writes dq, delta and the gradient of the gates; the gradients of learned tokens, query embedding, local bias,
    bias of the learned tokens and scale, in float32.

    Weights and products of a block of pooled tokens are kept from the sums to the gradient: more than 32 would not fit
    the registers of every chip.
    """
    M, T, programs = sizes[0], constants["WINDOW"] ** 2, B * blocks_of(sizes[1:3], constants)
    constants = {**constants, "BP": 32, "MORE": sizes[3] > 32}
    shares = partial_sums(tensors[0], programs, M, T + 1, constants["D"])
    sums = partial_sums(tensors[0], programs, M, 2 * T + 1)
    launch(_backward_queries, (programs * M,), *tensors, shares, sums, *sizes, **constants)
    rows_MTD, scalars = shares.sum(0), sums.sum(0)
    parts = (rows_MTD[:, :T].mT, rows_MTD[:, T], scalars[:, :T], scalars[:, T : 2 * T], scalars[:, 2 * T])
    # operators must not return views of one another
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)
