"""Backward of `kernels.aggregated_attention` for the pooled tokens and for the bias to them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregated_attention.patches import (
    CELLS,
    blocks_of_patches,
    corners_of_patches,
    halves,
    product_of_halves,
    tokens_of_patches,
)
from kernels.aggregated_attention.triton import (
    SMALLEST,
    blocks_of,
    direction,
    inverse_norm,
    load_bias,
    load_vector,
    log_of_keys,
)
from kernels.device.launch import launch, partial_sums, turns
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E


@triton.jit
def before_unit(x, grad):
    """The gradient of x from that of x̂; rows of a norm below the smallest were only divided by it."""
    inverse = inverse_norm(x)[:, None]
    unit = x.to(tl.float32) * inverse
    along = tl.where(inverse < 1.0 / SMALLEST, tl.sum(unit * grad, 1)[:, None], 0.0)
    return (grad - unit * along) * inverse


@triton.jit
def products_of_pooled(high, low, reach, do, k, v, pool_bias, token, inside, p, bias_row, IP: tl.constexpr):
    """Of a block of pooled tokens: products with their directions, which `reach` and the bias make logits in base 2,
    those logits, and the products of the gradient with the values."""
    bias = load_bias(pool_bias, token, p, inside, bias_row)  # first: sums are in the layout of what comes last
    product = product_of_halves(high, low, tl.trans(k), IP) * inverse_norm(k)[None, :]
    return product, product * reach[:, None] + bias, tl.dot(do, tl.trans(v), input_precision=IP)


@triton.jit
def pooled(
    high, low, reach, do, kv_pool, pool_bias, token, inside, start, P, C, pool_row, bias_row,
    D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Keys of a block of pooled tokens, the logits to them, and the products of the gradient with their values."""
    p = start + tl.arange(0, BP)
    k = load_rows(kv_pool, p, pool_row, p < P, D, BD)
    v = load_rows(kv_pool + C, p, pool_row, p < P, D, BD)
    _product, s, w = products_of_pooled(high, low, reach, do, k, v, pool_bias, token, inside, p, bias_row, IP)
    return k, s, w


@triton.jit
def _tile(
    grad, qkv, embedding, gates, lse, delta, block, image, head, here, M, H, W, P, grad_batch, grad_row, batch,
    row, D: tl.constexpr, WINDOW: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, BD: tl.constexpr,
    GATES: tl.constexpr,
):  # fmt: skip
    """What a block of tokens brings to every pooled token; weights of tokens that are not `here` become zero."""
    first = head * D
    top, left = corners_of_patches(block, W, GY, GX)
    y, x, inside = tokens_of_patches(top, left, H, W)
    inside = inside & here
    token = y * W + x
    q = direction(load_rows(qkv + image * batch + first, token, row, inside, D, BD))
    raised = q + load_vector(embedding + first, D, BD)[None, :]
    do = load_rows(grad + image * grad_batch + first, token, grad_row, inside, D, BD)
    place = (image * M + head) * (H * W)
    log = tl.load(lse + place + token, mask=inside, other=float("inf"))
    mean = tl.load(delta + place + token, mask=inside, other=0.0)
    log_keys = log_of_keys(y, x, H, W, P, WINDOW // 2)
    gate = tl.full([GY * GX * CELLS], 1.0, tl.float32)
    if GATES:
        gate = tl.load(gates + image * (H * W * M) + head + token * M, mask=inside, other=0.0).to(tl.float32)
    return token, inside, raised, log_keys, do, log, mean, gate


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
def _backward_pool(
    grad, qkv, kv_pool, scale, embedding, pool_bias, gates, lse, delta, shares, dscale,
    turns, B, M, H, W, P, bias_row, grad_batch, grad_row, batch, row, pool_batch, pool_row,
    D: tl.constexpr, WINDOW: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    ALIGN: tl.constexpr, GATES: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of the pooled tokens of an image, and their part of the scale's gradient, from every
    `splits`-th block of its queries."""
    C = M * D
    batch, row = batch // ALIGN * ALIGN, row // ALIGN * ALIGN
    grad_batch, grad_row = grad_batch // ALIGN * ALIGN, grad_row // ALIGN * ALIGN
    pool_batch, pool_row = pool_batch // ALIGN * ALIGN, pool_row // ALIGN * ALIGN
    blocks = tl.cdiv(P, BP)
    head = tl.program_id(0) % M
    which = tl.program_id(0) // M % blocks
    image = (tl.program_id(0) // M // blocks % B).to(tl.int64)
    split = tl.program_id(0) // M // blocks // B
    splits = tl.num_programs(0) // M // blocks // B
    pool = kv_pool + image * pool_batch + head * D
    pool_bias += head.to(tl.int64) * (H * W) * bias_row
    p = which * BP + tl.arange(0, BP)
    k = load_rows(pool, p, pool_row, p < P, D, BD)
    v = load_rows(pool + C, p, pool_row, p < P, D, BD)
    temperature = tl.load(scale + head).to(tl.float32)
    change = tl.zeros([GY * GX * CELLS], tl.float32)
    dk = tl.zeros([BP, BD], tl.float32)
    dv = tl.zeros([BP, BD], tl.float32)
    for turn in range(0, turns):
        token, inside, raised, log_keys, do, log, mean, gate = _tile(
            grad, qkv, embedding, gates, lse, delta, split + turn * splits, image, head, True,
            M, H, W, P, grad_batch, grad_row, batch, row, D, WINDOW, GY, GX, BD, GATES,
        )  # fmt: skip
        high, low = halves(raised, do.dtype)
        reach = temperature * log_keys
        product, s, w = products_of_pooled(
            high, low, reach * LOG2E, do, k, v, pool_bias, token, inside, p, bias_row, IP
        )
        a = tl.exp2(s - log[:, None])
        ds = a * (w - mean[:, None])
        change += tl.sum(ds * product, 1) * (log_keys * gate)
        ds *= (reach * gate)[:, None]
        dk = tl.dot(tl.trans(ds.to(do.dtype)), high, dk, input_precision=IP)
        dv = tl.dot(tl.trans((a * gate[:, None]).to(do.dtype)), do, dv, input_precision=IP)
    # (splits, B, P, 2 C)
    to = shares + (split.to(tl.int64) * B + image) * P * (2 * C) + head * D
    store_rows(to, p, 2 * C, p < P, before_unit(k, dk), D, BD)
    store_rows(to + C, p, 2 * C, p < P, dv, D, BD)
    # (splits · B · blocks, M)
    tl.store(dscale + tl.program_id(0), tl.sum(change, 0))


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["turns"])
def _backward_bias(
    grad, qkv, kv_pool, scale, embedding, pool_bias, gates, lse, delta, shares,
    turns, B, M, H, W, P, bias_row, grad_batch, grad_row, batch, row, pool_batch, pool_row,
    D: tl.constexpr, WINDOW: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    ALIGN: tl.constexpr, GATES: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The gradient of the bias from a block of tokens to one of pooled tokens, over every `splits`-th image."""
    C = M * D
    batch, row = batch // ALIGN * ALIGN, row // ALIGN * ALIGN
    grad_batch, grad_row = grad_batch // ALIGN * ALIGN, grad_row // ALIGN * ALIGN
    pool_batch, pool_row = pool_batch // ALIGN * ALIGN, pool_row // ALIGN * ALIGN
    blocks = tl.cdiv(P, BP)
    tiles = blocks_of_patches(H, W, GY, GX)
    head = tl.program_id(0) % M
    which = tl.program_id(0) // M % blocks
    tile = tl.program_id(0) // M // blocks % tiles
    split = tl.program_id(0) // M // blocks // tiles
    splits = tl.num_programs(0) // M // blocks // tiles
    pool_bias += head.to(tl.int64) * (H * W) * bias_row
    p = which * BP + tl.arange(0, BP)
    temperature = tl.load(scale + head).to(tl.float32)
    total = tl.zeros([GY * GX * CELLS, BP], tl.float32)
    for turn in range(0, turns):
        image = (split + turn * splits).to(tl.int64)
        token, inside, raised, log_keys, do, log, mean, gate = _tile(
            grad, qkv, embedding, gates, lse, delta, tile, image, head, image < B,
            M, H, W, P, grad_batch, grad_row, batch, row, D, WINDOW, GY, GX, BD, GATES,
        )  # fmt: skip
        pool = kv_pool + tl.minimum(image, B - 1) * pool_batch + head * D
        k = load_rows(pool, p, pool_row, p < P, D, BD)
        v = load_rows(pool + C, p, pool_row, p < P, D, BD)
        high, low = halves(raised, do.dtype)
        reach = temperature * log_keys * LOG2E
        _product, s, w = products_of_pooled(high, low, reach, do, k, v, pool_bias, token, inside, p, bias_row, IP)
        total += tl.exp2(s - log[:, None]) * (w * gate[:, None] - (mean * gate)[:, None])
    # (splits, M, N, P)
    top, left = corners_of_patches(tile, W, GY, GX)
    y, x, inside = tokens_of_patches(top, left, H, W)
    token = y * W + x
    to = shares + (split.to(tl.int64) * M + head) * (H * W) * P + token[:, None] * P + p[None, :]
    tl.store(to, total, mask=inside[:, None] & (p < P)[None, :])


def _constants_of_pool(constants: dict) -> dict:
    return {name: c for name, c in constants.items() if name not in ("HALO", "BT", "BH")}


def backward_of_pool(tensors: tuple, B: int, sizes: tuple, constants: dict, needed: bool) -> tuple[Tensor, Tensor]:
    """The gradients of the pooled tokens, and their part of that of the scale, in float32; nothing and 0 if they are
    not `needed`."""
    M, H, W, P, *_ = sizes
    if not needed:
        return tensors[0].new_empty(0), tensors[0].new_zeros(M, dtype=torch.float32)
    tiles, blocks = blocks_of((H, W), constants), triton.cdiv(P, constants["BP"])
    each = turns(B * blocks * M * tiles, tiles)
    splits = triton.cdiv(tiles, each)
    dkv = partial_sums(tensors[0], splits, B, P, 2 * M * constants["D"])
    dscale = partial_sums(tensors[0], splits * B * blocks, M)
    programs = (splits * B * blocks * M,)
    launch(_backward_pool, programs, *tensors, dkv, dscale, each, B, *sizes, **_constants_of_pool(constants))
    return dkv.sum(0), dscale.sum(0)


def backward_of_bias(tensors: tuple, B: int, sizes: tuple, constants: dict, needed: bool) -> Tensor:
    """The gradient of the bias to the pooled tokens, in float32; nothing if it is not `needed`."""
    M, H, W, P, *_ = sizes
    if not needed:
        return tensors[0].new_empty(0)
    tiles, blocks = blocks_of((H, W), constants), triton.cdiv(P, constants["BP"])
    each = turns(B * tiles * blocks * M, B)
    splits = triton.cdiv(B, each)
    dbias = partial_sums(tensors[0], splits, M, H * W, P)
    programs = (splits * tiles * blocks * M,)
    launch(_backward_bias, programs, *tensors, dbias, each, B, *sizes, **_constants_of_pool(constants))
    return dbias.sum(0)
