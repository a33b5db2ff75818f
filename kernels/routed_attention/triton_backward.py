"""Gradients of `kernels.routed_attention`, without atomics: along lists of regions, or dense; see `triton`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise_conv import triton_backward as depthwise_conv
from kernels.device.launch import launch, rows
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E, row_products
from kernels.routed_attention.triton import Plan, all_cells, listed, own_tile, place_of_program
from kernels.routed_attention.triton_batched import query_gradients_batched


@triton.jit
def _query_gradients(
    grad, q_base, k_base, v_base, out, lse, dq_base, entries, count, scale, token, inside, place, H, W,
    grad_row, qkv_row, d_row, out_row, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    DQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    q = load_rows(q_base, token, qkv_row, inside, DQ, BQ)
    g = load_rows(grad, token, grad_row, inside, DV, BV)
    delta = row_products(load_rows(out, token, out_row, inside, DV, BV), g)
    norm = tl.load(lse + token, mask=inside, other=0.0)
    dq = tl.zeros([BM, BQ], tl.float32)
    for start in range(0, count, BN):
        other, there, exists, bits = listed(entries, start, count, H, W, GW, h, w, BN)
        k = load_rows(k_base, other, qkv_row, there, DQ, BQ)
        v = load_rows(v_base, other, qkv_row, there, DV, BV)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) - norm[:, None])
        concerned = exists[None, :] if G == 1 else (bits[None, :] >> place[:, None]) & 1 != 0
        p = tl.where(concerned, p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_base, token, d_row, inside, dq * scale, DQ, BQ)


@triton.jit
def _key_gradients(
    grad, q_base, k_base, v_base, out, lse, dk_base, dv_base, entries, count, scale, token, inside, place, H, W,
    grad_row, qkv_row, d_row, out_row, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    DQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_base, token, qkv_row, inside, DQ, BQ)
    v = load_rows(v_base, token, qkv_row, inside, DV, BV)
    dk = tl.zeros([BM, BQ], tl.float32)
    dv = tl.zeros([BM, BV], tl.float32)
    for start in range(0, count, BN):
        other, there, _exists, bits = listed(entries, start, count, H, W, GW, h, w, BN)
        q = load_rows(q_base, other, qkv_row, there, DQ, BQ)
        g = load_rows(grad, other, grad_row, there, DV, BV)
        delta = row_products(load_rows(out, other, out_row, there, DV, BV), g)
        norm = tl.load(lse + other, mask=there, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) - norm[None, :])
        # what is outside the map or the list has zero queries and gradients, and adds nothing
        if G > 1:
            p = tl.where((bits[None, :] >> place[:, None]) & 1 != 0, p, 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    store_rows(dk_base, token, d_row, inside, dk * scale, DQ, BQ)
    store_rows(dv_base, token, d_row, inside, dv, DV, BV)


@triton.jit
def _differentiate(
    grad, qkv, out, lse, d_qkv, routes, routed, routed_count, routing, routing_count, scale, H, W, R, M, qk_dim, groups,
    routed_size, grad_batch, grad_row, qkv_batch, qkv_row, d_row, out_row, K: tl.constexpr, G: tl.constexpr,
    J: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first half of the programs of a head own queries, the second half keys: they share what they read in L2."""
    image, head, role, group, part = place_of_program(M, groups, G, h, w, BM, 2)
    token, inside, place = own_tile(group, part, H, W, R, G, GW, h, w, BM)
    q = qkv + image * qkv_batch + head * DQ
    k = q + qk_dim
    v = qkv + image * qkv_batch + 2 * qk_dim + head * DV
    dq = d_qkv + image * H * W * d_row + head * DQ
    dk = dq + qk_dim
    dv = d_qkv + image * H * W * d_row + 2 * qk_dim + head * DV
    grad += image * grad_batch + head * DV
    out += image * H * W * out_row + head * DV
    lse += (image * M + head) * H * W
    place_of_list = image * groups + group
    if role == 1:
        count = tl.load(routing_count + place_of_list) * (h * w)
        _key_gradients(
            grad, q, k, v, out, lse, dk, dv, routing + place_of_list * R, count, scale, token, inside, place, H, W,
            grad_row, qkv_row, d_row, out_row, G, GW, h, w, DQ, DV, BM, BK, BQ, BV, PRECISION,
        )  # fmt: skip
    elif J > 0:
        query_gradients_batched(
            grad, q, k, v, out, lse, dq, routes + image * R * K, group, scale, H, W, R, grad_row, qkv_row, d_row,
            out_row, K, G, GW, h, w, DQ, DV, J, BQ, BV,
        )  # fmt: skip
    elif G == 1:
        _query_gradients(
            grad, q, k, v, out, lse, dq, routes + (image * R + group) * K, K * h * w, scale, token, inside, place, H, W,
            grad_row, qkv_row, d_row, out_row, G, GW, h, w, DQ, DV, BM, BN, BQ, BV, PRECISION,
        )  # fmt: skip
    else:
        count = tl.load(routed_count + place_of_list) * (h * w)
        _query_gradients(
            grad, q, k, v, out, lse, dq, routed + place_of_list * routed_size, count, scale, token, inside, place, H, W,
            grad_row, qkv_row, d_row, out_row, G, GW, h, w, DQ, DV, BM, BN, BQ, BV, PRECISION,
        )  # fmt: skip


@triton.jit
def _differentiate_dense(
    grad, qkv, out, lse, d_qkv, routes, scale, H, W, M, qk_dim, grad_batch, grad_row, qkv_batch, qkv_row, d_row,
    out_row, R: tl.constexpr, K: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    DQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // M).to(tl.int64)
    head = tl.program_id(0) % M
    token, inside, _ahead = all_cells(0, H, W, R, GW, h, w, BM)
    region = tl.arange(0, BM) // (h * w)
    word = tl.zeros([BM], tl.int64)
    for i in range(K):  # row by row, for the registers: two programs fit a multiprocessor of sm_90
        target = tl.load(routes + (image * R + region) * K + i, mask=region < R, other=0)
        word = word | (tl.full([BM], 1, tl.int64) << target)
    qkv += image * qkv_batch
    d_qkv += image * H * W * d_row
    q = load_rows(qkv + head * DQ, token, qkv_row, inside, DQ, BQ)
    g = load_rows(grad + image * grad_batch + head * DV, token, grad_row, inside, DV, BV)
    delta = row_products(load_rows(out + image * H * W * out_row + head * DV, token, out_row, inside, DV, BV), g)
    log2_scale = scale * LOG2E
    dq = tl.zeros([BM, BQ], tl.float32)
    for start in range(0, R * h * w, BN):
        other, there, ahead = all_cells(start, H, W, R, GW, h, w, BN)
        k = load_rows(qkv + qk_dim + head * DQ, other, qkv_row, there, DQ, BQ)
        v = load_rows(qkv + 2 * qk_dim + head * DV, other, qkv_row, there, DV, BV)
        # loaded in every step to free registers, which an A100 would spill
        norm = tl.load(lse + (image * M + head) * H * W + token, mask=inside, other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale - norm[:, None])
        here = (word >> (start // (h * w))).to(tl.int32)
        p = tl.where((here[:, None] >> ahead[None, :]) & 1 != 0, p, 0.0)
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        store_rows(d_qkv + 2 * qk_dim + head * DV, other, d_row, there, dv, DV, BV)
        ds = (p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        store_rows(d_qkv + qk_dim + head * DQ, other, d_row, there, dk * scale, DQ, BQ)
    store_rows(d_qkv + head * DQ, token, d_row, inside, dq * scale, DQ, BQ)


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    routes: Tensor,
    grid: tuple[int, int],
    region: tuple[int, int],
    heads: int,
    qk_dim: int,
    scale: float | None,
) -> Tensor:
    """The gradient of qkv, (B, N, 2 qk_dim + C), without LePE."""
    grad, qkv = rows(grad), rows(qkv)
    plan = Plan(qkv, routes, grid, region, heads, qk_dim, scale, backward=True)
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    tensors = (grad, qkv, out, lse, d_qkv, plan.routes)
    strides = (grad.stride(0), grad.stride(1), qkv.stride(0), qkv.stride(1), d_qkv.stride(1), out.stride(1))
    if plan.dense:
        launch(
            _differentiate_dense, (qkv.shape[0] * heads,), *tensors, plan.scale, *grid, heads, qk_dim, *strides,
            R=plan.R, K=plan.K, **plan.constants, warps=plan.warps, stages=1, maxnreg=plan.registers,
        )  # fmt: skip
    else:
        launch(
            _differentiate, (qkv.shape[0] * heads * 2 * plan.programs,), *tensors, *plan.lists(backward=True),
            plan.scale, *plan.size, qk_dim, plan.groups, min(plan.R, plan.G * plan.K), *strides,
            K=plan.K, G=plan.G, J=plan.J, BK=min(32, plan.constants["BN"]), **plan.constants, warps=plan.warps,
        )  # fmt: skip
    return d_qkv


def lepe_gradients(
    grad: Tensor, v: Tensor, dv: Tensor | None, weight: Tensor, grid: tuple[int, int], *, trained: bool
) -> tuple[Tensor, Tensor] | None:
    """Those of weight and bias if it is trained; that of v is added to dv."""
    return depthwise_conv.gradients(rows(grad), v, weight, dv, (*grid, 0), other=dv, trained=trained)
