"""Triton kernels of `kernels.moh_attention`: gated attention that can leave out heads.

Attention is computed online, a tile of queries against all keys, with the gate in the epilogue. Where heads are left
out, a first kernel lists the tokens of every head, those with a gate first; a tile takes its queries through that list.
The grid is that of dense attention, so the host needs no count: tiles behind the last gated token turn zero times
through the loop and write the zeros that belong there. Keys and values are never left out.

A gradient has one owner: a program has that of its queries, or of its keys and values, or with few tokens, where a
launch counts, first the one and then the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.channels import load_channels, split, store_channels
from kernels.device.launch import launch, power_of_2, precision, rows
from kernels.device.softmax import LOG2E, row_products

SEPARATE_FROM = 512  # tokens: from here on queries have a backward launch of their own


@triton.jit
def _tokens(row, index, pair, limit, N, SKIP: tl.constexpr):
    """Tokens in these rows of the head's list, and whether they have a gate. Without a list, row is token."""
    token = tl.load(index + pair * N + row, mask=row < N, other=0) if SKIP else row
    return token, row < limit


@triton.jit
def _list(gates, index, count, N, M: tl.constexpr, CHUNK: tl.constexpr):
    """Tokens with a gate from the front in their order, the others from the back."""
    pair = tl.program_id(0).to(tl.int64)
    gates += pair // M * N * M + pair % M
    found = 0
    for start in range(0, N, CHUNK):
        n = start + tl.arange(0, CHUNK)
        gate = tl.load(gates + n * M, mask=n < N, other=0.0).to(tl.float32)
        live = gate != 0
        one = live.to(tl.int32)
        before = found + tl.cumsum(one, 0) - one
        tl.store(index + pair * N + tl.where(live, before, N - 1 - n + before), n, mask=n < N)
        found += tl.sum(one, 0)
    tl.store(count + pair, found)


@triton.jit
def _forward(
    qkv, gates, index, count, out, lse, N, qkv_batch, qkv_row, qk_scale,
    M: tl.constexpr, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SKIP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BM)
    tile = tl.program_id(0) % tiles
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // M, (pair % M).to(tl.int32)
    q = qkv + image * qkv_batch + head * D
    k = q + M * D
    v = k + M * D
    limit = tl.load(count + pair) if SKIP else N
    row = tile * BM + tl.arange(0, BM)
    token, live = _tokens(row, index, pair, limit, N, SKIP)
    q0 = load_channels(q, token, qkv_row, live, 0, A, D)
    acc0 = tl.zeros([BM, A], tl.float32)
    if R:
        q1 = load_channels(q, token, qkv_row, live, A, R, D)
        acc1 = tl.zeros([BM, R], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, tl.where(tile * BM < limit, N, 0), BN):
        n = start + tl.arange(0, BN)
        here = n < N
        s = tl.dot(q0, tl.trans(load_channels(k, n, qkv_row, here, 0, A, D)), input_precision=PRECISION)
        if R:
            s = tl.dot(q1, tl.trans(load_channels(k, n, qkv_row, here, A, R, D)), s, input_precision=PRECISION)
        if not EVEN:
            s = tl.where(here[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 1)
        p = p.to(qkv.dtype.element_ty)
        acc0 = tl.dot(p, load_channels(v, n, qkv_row, here, 0, A, D), acc0 * fade[:, None], input_precision=PRECISION)
        if R:
            acc1 = tl.dot(
                p, load_channels(v, n, qkv_row, here, A, R, D), acc1 * fade[:, None], input_precision=PRECISION
            )
        top = higher
    gate = tl.load(gates + (image * N + token) * M + head, mask=live, other=0.0).to(tl.float32)
    gated = live & (gate != 0)
    total = tl.where(total > 0, total, 1.0)  # 0 where the loop did not turn
    factor = (gate / total)[:, None]
    out += image * N * (M * D) + head * D
    # where, because 0 · inf would not be 0
    store_channels(tl.where(gated[:, None], acc0 * factor, 0.0), out, token, M * D, row < N, 0, A, D)
    if R:
        store_channels(tl.where(gated[:, None], acc1 * factor, 0.0), out, token, M * D, row < N, A, R, D)
    tl.store(lse + pair * N + row, tl.where(live, top + tl.log2(total), 0.0), mask=row < N)


@triton.jit
def _backward(
    qkv, gates, index, count, out, grad, lse, dqkv, dgates, delta, N, qkv_batch, qkv_row, grad_batch, grad_row,
    qk_scale, scale,
    M: tl.constexpr, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SKIP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With QUERIES dq and dgates of OWN rows of the list, with KEYS dk and dv of OWN keys, each over all of the others.

    With QUERIES alone, Σ grad · out and the gates of the rows are left in `delta`, where KEYS alone reads them.
    """
    tiles = tl.cdiv(N, OWN)
    own = tl.program_id(0) % tiles * OWN + tl.arange(0, OWN)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = pair // M, (pair % M).to(tl.int32)
    q = qkv + image * qkv_batch + head * D
    k = q + M * D
    v = k + M * D
    grad += image * grad_batch + head * D
    out += image * N * (M * D) + head * D
    dqkv += image * N * (3 * M * D) + head * D
    gates += image * N * M + head
    lse += pair * N
    delta += pair * (2 * N)
    limit = tl.load(count + pair) if SKIP else N
    if QUERIES:
        token, live = _tokens(own, index, pair, limit, N, SKIP)
        q0 = load_channels(q, token, qkv_row, live, 0, A, D)
        g0 = load_channels(grad, token, grad_row, live, 0, A, D)
        d = row_products(g0, load_channels(out, token, M * D, live, 0, A, D))
        dq0 = tl.zeros([OWN, A], tl.float32)
        if R:
            q1 = load_channels(q, token, qkv_row, live, A, R, D)
            g1 = load_channels(grad, token, grad_row, live, A, R, D)
            d += row_products(g1, load_channels(out, token, M * D, live, A, R, D))
            dq1 = tl.zeros([OWN, R], tl.float32)
        gate = tl.load(gates + token * M, mask=live, other=0.0).to(tl.float32)
        height = tl.load(lse + own, mask=live, other=float("inf"))
        dgate = tl.zeros([OWN], tl.float32)
        for start in range(0, tl.where(tl.program_id(0) % tiles * OWN < limit, N, 0), STEP):
            n = start + tl.arange(0, STEP)
            here = n < N
            k0 = load_channels(k, n, qkv_row, here, 0, A, D)
            s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            dp = tl.dot(g0, tl.trans(load_channels(v, n, qkv_row, here, 0, A, D)), input_precision=PRECISION)
            if R:
                k1 = load_channels(k, n, qkv_row, here, A, R, D)
                s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
                dp = tl.dot(g1, tl.trans(load_channels(v, n, qkv_row, here, A, R, D)), dp, input_precision=PRECISION)
            p = tl.exp2(s * qk_scale - height[:, None])
            if not EVEN:
                p = tl.where(here[None, :], p, 0.0)
            dgate += tl.sum(p * dp, 1)
            ds = (p * (gate[:, None] * dp - d[:, None])).to(qkv.dtype.element_ty)
            dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
            if R:
                dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        store_channels(dq0 * scale, dqkv, token, 3 * M * D, own < N, 0, A, D)
        if R:
            store_channels(dq1 * scale, dqkv, token, 3 * M * D, own < N, A, R, D)
        dgate = tl.where(gate != 0, dgate, 0.0)
        tl.store(dgates + image * N * M + head + token * M, dgate.to(dgates.dtype.element_ty), mask=own < N)
        if not KEYS:
            tl.store(delta + own, d, mask=own < N)
            tl.store(delta + N + own, gate, mask=own < N)
    if KEYS:
        mine = own < N
        kt0 = load_channels(k, own, qkv_row, mine, 0, A, D)
        vt0 = load_channels(v, own, qkv_row, mine, 0, A, D)
        dk0 = tl.zeros([OWN, A], tl.float32)
        dv0 = tl.zeros([OWN, A], tl.float32)
        if R:
            kt1 = load_channels(k, own, qkv_row, mine, A, R, D)
            vt1 = load_channels(v, own, qkv_row, mine, A, R, D)
            dk1 = tl.zeros([OWN, R], tl.float32)
            dv1 = tl.zeros([OWN, R], tl.float32)
        for first in range(0, limit, STEP):
            row = first + tl.arange(0, STEP)
            at, there = _tokens(row, index, pair, limit, N, SKIP)
            qs0 = load_channels(q, at, qkv_row, there, 0, A, D)
            gs0 = load_channels(grad, at, grad_row, there, 0, A, D)
            if R:
                qs1 = load_channels(q, at, qkv_row, there, A, R, D)
                gs1 = load_channels(grad, at, grad_row, there, A, R, D)
            if QUERIES:
                ds_row = row_products(gs0, load_channels(out, at, M * D, there, 0, A, D))
                if R:
                    ds_row += row_products(gs1, load_channels(out, at, M * D, there, A, R, D))
                gate_row = tl.load(gates + at * M, mask=there, other=0.0).to(tl.float32)
            else:
                ds_row = tl.load(delta + row, mask=there, other=0.0)
                gate_row = tl.load(delta + N + row, mask=there, other=0.0)
            # scores are transposed, (keys, queries): left operands of the products as they are
            st = tl.dot(kt0, tl.trans(qs0), input_precision=PRECISION)
            if R:
                st = tl.dot(kt1, tl.trans(qs1), st, input_precision=PRECISION)
            pt = tl.exp2(st * qk_scale - tl.load(lse + row, mask=there, other=float("inf"))[None, :])
            gated = (pt * gate_row[None, :]).to(qkv.dtype.element_ty)
            dv0 = tl.dot(gated, gs0, dv0, input_precision=PRECISION)
            dpt = tl.dot(vt0, tl.trans(gs0), input_precision=PRECISION)
            if R:
                dv1 = tl.dot(gated, gs1, dv1, input_precision=PRECISION)
                dpt = tl.dot(vt1, tl.trans(gs1), dpt, input_precision=PRECISION)
            dst = (pt * (gate_row[None, :] * dpt - ds_row[None, :])).to(qkv.dtype.element_ty)
            dk0 = tl.dot(dst, qs0, dk0, input_precision=PRECISION)
            if R:
                dk1 = tl.dot(dst, qs1, dk1, input_precision=PRECISION)
        store_channels(dk0 * scale, dqkv + M * D, own, 3 * M * D, mine, 0, A, D)
        store_channels(dv0, dqkv + 2 * M * D, own, 3 * M * D, mine, 0, A, D)
        if R:
            store_channels(dk1 * scale, dqkv + M * D, own, 3 * M * D, mine, A, R, D)
            store_channels(dv1, dqkv + 2 * M * D, own, 3 * M * D, mine, A, R, D)


def tiles(backward: bool, tokens: int, head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows that a program owns, rows of a step, warps, stages.

    As large as registers allow, so that the other rows are read from cache seldom: a program takes 160 to 250 of the
    255 registers. In float32 products have no tensor cores and keep both operands in registers.
    """
    wide, narrow = head_dim > 96, head_dim <= 32
    if itemsize == 4:
        found = (64, 64, 8, 2) if narrow else (32, 32, 8, 2) if backward else (32, 16 if wide else 64, 8, 2)
    elif wide:
        found = (64, 64, 8, 2) if backward else (128, 64, 8, 2)
    elif backward:
        found = (128, 64 if narrow or (head_dim <= 64 and tokens >= SEPARATE_FROM) else 32, 8, 2)
    else:
        found = (128, 64, 4 if head_dim <= 64 else 8, 3)
    own, step, warps, stages = found
    most = power_of_2(tokens)
    return min(own, most), min(step, most), 4 if most < own else warps, stages


def forward(qkv: Tensor, gates: Tensor, scale: float, skip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, log2 of the softmax's sum (B, M, N), tokens of every head (B, M, N) and their number (B, M)."""
    qkv, gates = rows(qkv), gates.contiguous()
    (B, N, M), C = gates.shape, qkv.shape[2] // 3
    out = torch.empty(B, N, C, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, M, N, dtype=torch.float32, device=qkv.device)
    index = torch.empty(B, M, N if skip else 0, dtype=torch.int32, device=qkv.device)
    count = torch.empty(B, M if skip else 0, dtype=torch.int32, device=qkv.device)
    if skip:
        launch(_list, (B * M,), gates, index, count, N, M=M, CHUNK=min(2048, power_of_2(N)), warps=8)
    BM, BN, warps, stages = tiles(False, N, C // M, qkv.element_size())
    launch(
        _forward, (B * M * triton.cdiv(N, BM),), qkv, gates, index, count, out, lse, N, qkv.stride(0), qkv.stride(1),
        scale * LOG2E.value, EVEN=N % BN == 0, BM=BM, BN=BN, warps=warps, stages=stages, **_constants(qkv, M, skip),
    )  # fmt: skip
    return out, lse, index, count


def backward(
    grad: Tensor, qkv: Tensor, gates: Tensor, out: Tensor, lse: Tensor, index: Tensor, count: Tensor, scale: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv and gates; where only the latter are `needed`, those of keys and values are left out."""
    grad, qkv, gates = rows(grad), rows(qkv), gates.contiguous()
    (B, N, M), C, skip = gates.shape, out.shape[2], index.shape[2] > 0
    dqkv = torch.empty(B, N, 3 * C, dtype=qkv.dtype, device=qkv.device)
    dgates = torch.empty(B, N, M, dtype=gates.dtype, device=qkv.device)
    # in few tokens one launch costs more than Σ grad · out once more
    phases = [(True, True)] if N < SEPARATE_FROM else [(True, False), (False, True)]
    phases = phases if needed[0] else [(True, False)]
    delta = torch.empty(B, M, 2, N if (True, False) in phases else 0, dtype=torch.float32, device=qkv.device)
    OWN, STEP, warps, stages = tiles(True, N, C // M, qkv.element_size())
    for queries, keys in phases:
        launch(
            _backward, (B * M * triton.cdiv(N, OWN),), qkv, gates, index, count, out, grad, lse, dqkv, dgates, delta, N,
            qkv.stride(0), qkv.stride(1), grad.stride(0), grad.stride(1), scale * LOG2E.value, scale,
            OWN=OWN, STEP=STEP, QUERIES=queries, KEYS=keys, EVEN=N % STEP == 0, warps=warps, stages=stages,
            **_constants(qkv, M, skip),
        )  # fmt: skip
    return dqkv, dgates


def _constants(qkv: Tensor, num_heads: int, skip: bool) -> dict:
    D = qkv.shape[2] // (3 * num_heads)
    A, R = split(D)
    return {"M": num_heads, "D": D, "A": A, "R": R, "SKIP": skip, "PRECISION": precision(qkv.dtype)}
