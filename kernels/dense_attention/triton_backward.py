"""Backward of `kernels.dense_attention`, without atomics: a phase that owns dq, and one that owns dk and dv.

Sigmoid weights need nothing but queries, keys and values, ds = p (1 - p) dw, so that one launch has both phases, and
reads memory once. Clipped ones need Σ p dp of each row, with dp = (ζ - γ) dw where nothing is clipped: the first of two
launches finds it in a pass over the keys, the second reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dense_attention.triton import (
    constants_of,
    numbers_of,
    place_of,
    probability,
    shifted,
    tiles,
    weight,
)
from kernels.device.channels import added, load_head, no_head, products, store_head
from kernels.device.launch import launch, rows
from kernels.device.softmax import LOG2E


@triton.jit
def _passed(p, dw, gamma, zeta):
    """The gradient of the softmax behind the clipping."""
    raw = p * (zeta - gamma) + gamma
    return tl.where((raw >= 0.0) & (raw <= 1.0), dw * (zeta - gamma), 0.0)


@triton.jit
def _logit_gradient(p, dw, change, gamma, zeta, CLIPPED: tl.constexpr):
    return p * (_passed(p, dw, gamma, zeta) - change) if CLIPPED else (p - p * p) * dw


@triton.jit
def _queries(
    q, grad, to, lse, delta, dbias, own, N, row, grad_row, log_scale, scale, level, gamma, zeta,
    M: tl.constexpr, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    CLIPPED: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq; with SUM what the tile adds to the gradient of the bias; of clipped weights Σ p dp, for `_keys`."""
    mine = own < N
    k = q + M * D
    v = k + M * D
    queries = load_head(q, own, row, mine, D, A, R)
    go = load_head(grad, own, grad_row, mine, D, A, R)
    change = 0.0
    if CLIPPED:
        level = tl.load(lse + own, mask=mine, other=0.0)[:, None]
        sums = tl.zeros([OWN], tl.float32)
        for start in range(0, N, STEP):
            n = start + tl.arange(0, STEP)
            s = products(queries, load_head(k, n, row, n < N, D, A, R), R, PRECISION)
            dw = products(go, load_head(v, n, row, n < N, D, A, R), R, PRECISION)
            p = probability(s * log_scale, level, CLIPPED)
            if not EVEN:
                p = tl.where((n < N)[None, :], p, 0.0)
            sums += tl.sum(p * _passed(p, dw, gamma, zeta), 1)
        tl.store(delta + own, sums, mask=mine)
        change = sums[:, None]
    if SUM:
        total = tl.zeros([OWN], tl.float32)
    dq = no_head(OWN, A, R)
    for start in range(0, N, STEP):
        n = start + tl.arange(0, STEP)
        keys = load_head(k, n, row, n < N, D, A, R)
        s = products(queries, keys, R, PRECISION)
        dw = products(go, load_head(v, n, row, n < N, D, A, R), R, PRECISION)
        p = probability(s * log_scale, level, CLIPPED)
        if CLIPPED and not EVEN:
            p = tl.where((n < N)[None, :], p, 0.0)
        ds = _logit_gradient(p, dw, change, gamma, zeta, CLIPPED)
        if SUM:
            total += tl.sum(ds, 1)
        dq = added(dq, ds.to(q.dtype.element_ty), keys, R, PRECISION)
    store_head(dq, scale, to, own, 3 * M * D, mine, D, A, R)
    if SUM:
        tl.store(dbias + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _keys(
    q, grad, to, lse, delta, own, N, row, grad_row, log_scale, scale, level, gamma, zeta,
    M: tl.constexpr, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    CLIPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv. Weights are transposed, (keys, queries): left operands as they are. Rows beyond N hold anything."""
    mine = own < N
    keys = load_head(q + M * D, own, row, mine, D, A, R)
    values = load_head(q + 2 * M * D, own, row, mine, D, A, R)
    dk = no_head(OWN, A, R)
    dv = no_head(OWN, A, R)
    for start in range(0, N, STEP):
        n = start + tl.arange(0, STEP)
        there = n < N
        queries = load_head(q, n, row, there, D, A, R)
        go = load_head(grad, n, grad_row, there, D, A, R)
        if CLIPPED:
            # +inf makes the weights of queries that are not there zero
            height = tl.load(lse + n, mask=there, other=float("inf"))[None, :]
            change = tl.load(delta + n, mask=there, other=0.0)[None, :]
        else:
            height, change = level, 0.0
        p = probability(products(keys, queries, R, PRECISION) * log_scale, height, CLIPPED)
        w = weight(p, gamma, zeta, CLIPPED)
        dv = added(dv, w.to(q.dtype.element_ty), go, R, PRECISION)
        ds = _logit_gradient(p, products(values, go, R, PRECISION), change, gamma, zeta, CLIPPED)
        dk = added(dk, ds.to(q.dtype.element_ty), queries, R, PRECISION)
    store_head(dk, scale, to + M * D, own, 3 * M * D, mine, D, A, R)
    store_head(dv, 1.0, to + 2 * M * D, own, 3 * M * D, mine, D, A, R)


@triton.jit
def _backward(
    qkv, bias, grad, lse, delta, dqkv, dbias, N, batch, row, grad_batch, grad_row, log_scale, scale, shift, gamma, zeta,
    M: tl.constexpr, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    CLIPPED: tl.constexpr, LEARNED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SUM: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With QUERIES dq of OWN tokens, with KEYS their dk and dv."""
    own, image, head, pair = place_of(N, M, OWN)
    q = qkv + image * batch + head * D
    grad += image * grad_batch + head * D
    to = dqkv + image * N * (3 * M * D) + head * D
    level = 0.0 if CLIPPED else shifted(bias, shift, head, LEARNED)
    lse += pair * N
    delta += pair * N
    if QUERIES:
        _queries(
            q, grad, to, lse, delta, dbias, own, N, row, grad_row, log_scale, scale, level, gamma, zeta,
            M, D, A, R, OWN, STEP, CLIPPED, SUM, EVEN, PRECISION,
        )  # fmt: skip
    if KEYS:
        _keys(
            q, grad, to, lse, delta, own, N, row, grad_row, log_scale, scale, level, gamma, zeta,
            M, D, A, R, OWN, STEP, CLIPPED, PRECISION,
        )  # fmt: skip


def backward(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, lse: Tensor | None, heads: int,
    numbers: tuple[float, float, float, float], needed: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv and bias; an empty one of a bias of which it is not needed.

    Where that of qkv is not, those of keys and values are left out.
    """
    grad, qkv = rows(grad), rows(qkv)
    (B, N, C), clipped = grad.shape, lse is not None
    sums = bias is not None and needed[1]
    sizes = tiles(True, N, C // heads, qkv.element_size())
    parts = triton.cdiv(N, sizes["OWN"])
    dqkv = torch.empty(B, N, 3 * C, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse) if clipped else None
    dbias = torch.empty(B, heads, parts if sums else 0, dtype=torch.float32, device=qkv.device)
    scale, *others = numbers
    given = (
        qkv, numbers_of(bias, qkv), grad, numbers_of(lse, qkv), numbers_of(delta, qkv), dqkv, dbias, N,
        qkv.stride(0), qkv.stride(1), grad.stride(0), grad.stride(1), scale * LOG2E.value, scale, *others,
    )  # fmt: skip
    constants = sizes | constants_of(qkv, heads, bias, clipped) | {"EVEN": N % sizes["STEP"] == 0}
    # keys need what queries of all tiles leave where weights are clipped
    phases = [(True, False), (False, True)] if clipped else [(True, needed[0])]
    for queries, keys in phases:
        launch(_backward, (B * heads * parts,), *given, QUERIES=queries, KEYS=keys, SUM=sums, **constants)
    return dqkv, dbias.sum((0, 2)).view(bias.shape).to(bias.dtype) if sums else qkv.new_empty(0)
