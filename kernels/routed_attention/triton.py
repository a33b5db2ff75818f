"""Triton kernels of `kernels.routed_attention`: routing, attention along routes, and its gradients, without atomics.

Queries and keys are taken where the projection left them, in tiles of one of two kinds:
- lists (`_attend`, `_differentiate`): a tile holds the cells of a region, or several small regions. It visits the
  regions that any of its own are routed to, or for the gradients of keys those that are routed to any of its own. An
  entry of these lists is a region (16 bits) and which regions of the tile it concerns (16 bits); `_list_routes` makes
  them, each in increasing order, from the routes alone. A single region attends along its routes as they are.
- dense (`_attend_dense`, `_differentiate_dense`): few tokens in tiny regions. A program holds all queries of a head,
  with the routes of a query as the bits of one 64-bit word, and passes once over all keys. Its backward pass reads and
  writes everything once.
Cells outside the map are zeros that take part in the softmax. One program owns each element of every result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise_conv import triton as depthwise_conv
from kernels.device.launch import launch, power_of_2, precision, rows

LOG2E = 1.4426950408889634


@triton.jit
def _token(region, cell, H, W, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """Where a cell of a region is in the image, and whether it is inside."""
    y = region // GW * h + cell // w
    x = region % GW * w + cell % w
    return y * W + x, (y < H) & (x < W)


@triton.jit
def _own(group, part, H, W, R, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, BM: tl.constexpr):
    """Tokens of a tile, which are inside, and the place of their region among the G regions of the tile."""
    flat = part * BM + tl.arange(0, BM)
    place = tl.minimum(flat // (h * w), G - 1)
    region = group * G + place
    token, inside = _token(region, flat % (h * w), H, W, GW, h, w)
    return token, inside & (flat < G * h * w) & (region < R), place


@triton.jit
def _listed(entries, start, count, H, W, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, BN: tl.constexpr):
    """The next BN cells of the listed regions: tokens, which are inside, which exist, and the bits of their region."""
    flat = start + tl.arange(0, BN)
    exists = flat < count
    entry = tl.load(entries + flat // (h * w), mask=exists, other=0)
    region = (entry & 0xFFFF).to(tl.int32)
    token, inside = _token(region, flat % (h * w), H, W, GW, h, w)
    return token, inside & exists, exists, (entry >> 16).to(tl.int32)


@triton.jit
def _load(base, token, keep, row, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(base + token[:, None] * row + d[None, :], mask=keep[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(base, value, token, keep, row, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    tl.store(base + token[:, None] * row + d[None, :], value.to(base.dtype.element_ty),
             mask=keep[:, None] & (d < D)[None, :])  # fmt: skip


@triton.jit
def _delta(out, grad):
    return tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)


@triton.jit
def _means(
    x, out, H, W, C, R, x_batch, x_row, GW, h: tl.constexpr, w: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    image = (tl.program_id(0) // R).to(tl.int64)
    region = tl.program_id(0) % R
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = c < C
    top = region // GW * h
    left = region % GW * w
    x += image * x_batch
    total = tl.zeros([BT, BC], tl.float32)
    for start in range(0, h * w, BT):
        cell = start + tl.arange(0, BT)
        y = top + cell // w
        column = left + cell % w
        keep = (cell < h * w) & (y < H) & (column < W)
        value = tl.load(
            x + (y * W + column)[:, None] * x_row + c[None, :], mask=keep[:, None] & live[None, :], other=0.0
        )
        total += value.to(tl.float32)
    cells = tl.minimum(h, H - top) * tl.minimum(w, W - left)
    tl.store(out + (image * R + region) * C + c, tl.sum(total, 0) / cells.to(tl.float32), mask=live)


@triton.jit
def _select(q, k, routes, R, C, K, scale, BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The K best of each row of the affinity; a row stays in registers."""
    tiles = tl.cdiv(R, BM)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    column = tl.arange(0, BR)
    q += image * R * C
    k += image * R * C
    affinity = tl.zeros([BM, BR], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        live = c < C
        left = tl.load(q + row[:, None] * C + c[None, :], mask=(row < R)[:, None] & live[None, :], other=0.0)
        right = tl.load(k + column[None, :] * C + c[:, None], mask=live[:, None] & (column < R)[None, :], other=0.0)
        affinity += tl.dot(left.to(tl.float32) * scale, right.to(tl.float32), input_precision="ieee")
    # ordered as integers: value first, then the lowest index; NaN counts as the largest, as in torch.sort
    affinity = tl.where(affinity == affinity, affinity, float("inf"))
    bits = tl.where(affinity == 0, 0.0, affinity).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    lowest = tl.full([BM, BR], -(2**63), tl.int64)
    key = tl.where((column < R)[None, :], ordered * 65536 + (65535 - column)[None, :], lowest)
    for i in range(K):
        best = 65535 - (tl.max(key, 1) & 65535).to(tl.int32)
        tl.store(routes + (image * R + row) * K + i, best.to(tl.int64), mask=row < R)
        key = tl.where(column[None, :] == best[:, None], lowest, key)


@triton.jit
def _list_routes(
    routes, routed, routed_count, routing, routing_count, R, K, groups, routed_size,
    G: tl.constexpr, BR: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """For each group of G regions: the regions that they are routed to, and the regions that are routed to them."""
    group = tl.program_id(0) % groups
    image = (tl.program_id(0) // groups).to(tl.int64)
    routes += image * R * K
    place = image * groups + group
    if FORWARD:
        count = 0
        for start in range(0, R, BR):
            region = start + tl.arange(0, BR)
            found = tl.zeros([BR], tl.int32)
            for i in range(tl.minimum(G, R - group * G) * K):
                target = tl.load(routes + group * G * K + i)
                found = tl.where(region == target, found | (1 << (i // K)), found)
            keep = (found != 0).to(tl.int32)
            slot = count + tl.cumsum(keep, 0) - 1
            tl.store(routed + place * routed_size + slot, region | (found << 16), mask=keep != 0)
            count += tl.sum(keep, 0)
        tl.store(routed_count + place, count)
    if BACKWARD:
        count = 0
        for start in range(0, R, BR):
            region = start + tl.arange(0, BR)
            found = tl.zeros([BR], tl.int32)
            for i in range(K):
                target = tl.load(routes + region * K + i, mask=region < R, other=-1).to(tl.int32) - group * G
                mine = (target >= 0) & (target < G)
                found = tl.where(mine, found | (1 << tl.where(mine, target, 0)), found)
            keep = (found != 0).to(tl.int32)
            slot = count + tl.cumsum(keep, 0) - 1
            tl.store(routing + place * R + slot, region | (found << 16), mask=keep != 0)
            count += tl.sum(keep, 0)
        tl.store(routing_count + place, count)


@triton.jit
def _where(M, groups, G: tl.constexpr, h: tl.constexpr, w: tl.constexpr, BM: tl.constexpr, ROLES: tl.constexpr):
    """Image, head, role, group of regions and part of the group of this program, the last one changing fastest."""
    parts: tl.constexpr = (G * h * w + BM - 1) // BM
    tile = tl.program_id(0)
    part = tile % parts
    group = tile // parts % groups
    role = tile // (parts * groups) % ROLES
    head = tile // (parts * groups * ROLES) % M
    image = (tile // (parts * groups * ROLES * M)).to(tl.int64)
    return image, head, role, group, part


@triton.jit
def _attend(
    qkv, out, lse, routes, routed, routed_count, scale, H, W, R, M, qk_dim, groups, routed_size, qkv_batch, qkv_row,
    out_row, K: tl.constexpr, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, DQ: tl.constexpr,
    DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head, _role, group, part = _where(M, groups, G, h, w, BM, 1)
    token, inside, place = _own(group, part, H, W, R, G, GW, h, w, BM)
    qkv += image * qkv_batch
    k_base = qkv + qk_dim + head * DQ
    v_base = qkv + 2 * qk_dim + head * DV
    q = _load(qkv + head * DQ, token, inside, qkv_row, DQ, BQ)
    if G == 1:
        entries = routes + (image * R + group) * K
        count = K * h * w
    else:
        entries = routed + (image * groups + group) * routed_size
        count = tl.load(routed_count + image * groups + group) * (h * w)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for start in range(0, count, BN):
        other, there, exists, bits = _listed(entries, start, count, H, W, GW, h, w, BN)
        k = _load(k_base, other, there, qkv_row, DQ, BQ)
        v = _load(v_base, other, there, qkv_row, DV, BV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        concerned = exists[None, :] if G == 1 else (bits[None, :] >> place[:, None]) & 1 != 0
        s = tl.where(concerned, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # none of the keys so far may concern this query: -inf - -inf is not a number
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    total = tl.where(inside, total, 1.0)
    _store(out + image * H * W * out_row + head * DV, acc / total[:, None], token, inside, out_row, DV, BV)
    tl.store(lse + (image * M + head) * H * W + token, top + tl.log2(total), mask=inside)


@triton.jit
def _query_gradients(
    grad, q_base, k_base, v_base, out, lse, dq_base, entries, count, scale, token, inside, place, H, W,
    grad_row, qkv_row, d_row, out_row, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    DQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    q = _load(q_base, token, inside, qkv_row, DQ, BQ)
    g = _load(grad, token, inside, grad_row, DV, BV)
    delta = _delta(_load(out, token, inside, out_row, DV, BV), g)
    norm = tl.load(lse + token, mask=inside, other=0.0)
    dq = tl.zeros([BM, BQ], tl.float32)
    for start in range(0, count, BN):
        other, there, exists, bits = _listed(entries, start, count, H, W, GW, h, w, BN)
        k = _load(k_base, other, there, qkv_row, DQ, BQ)
        v = _load(v_base, other, there, qkv_row, DV, BV)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634) - norm[:, None])
        concerned = exists[None, :] if G == 1 else (bits[None, :] >> place[:, None]) & 1 != 0
        p = tl.where(concerned, p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(dq_base, dq * scale, token, inside, d_row, DQ, BQ)


@triton.jit
def _key_gradients(
    grad, q_base, k_base, v_base, out, lse, dk_base, dv_base, entries, count, scale, token, inside, place, H, W,
    grad_row, qkv_row, d_row, out_row, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    DQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    k = _load(k_base, token, inside, qkv_row, DQ, BQ)
    v = _load(v_base, token, inside, qkv_row, DV, BV)
    dk = tl.zeros([BM, BQ], tl.float32)
    dv = tl.zeros([BM, BV], tl.float32)
    for start in range(0, count, BN):
        other, there, _exists, bits = _listed(entries, start, count, H, W, GW, h, w, BN)
        q = _load(q_base, other, there, qkv_row, DQ, BQ)
        g = _load(grad, other, there, grad_row, DV, BV)
        delta = _delta(_load(out, other, there, out_row, DV, BV), g)
        norm = tl.load(lse + other, mask=there, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634) - norm[None, :])
        # what is outside the map or the list has zero queries and gradients, and adds nothing
        if G > 1:
            p = tl.where((bits[None, :] >> place[:, None]) & 1 != 0, p, 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _store(dk_base, dk * scale, token, inside, d_row, DQ, BQ)
    _store(dv_base, dv, token, inside, d_row, DV, BV)


@triton.jit
def _differentiate(
    grad, qkv, out, lse, d_qkv, routes, routed, routed_count, routing, routing_count, scale, H, W, R, M, qk_dim, groups,
    routed_size, grad_batch, grad_row, qkv_batch, qkv_row, d_row, out_row, K: tl.constexpr, G: tl.constexpr,
    GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first half of the programs of a head own queries, the second half keys: they share what they read in L2."""
    image, head, role, group, part = _where(M, groups, G, h, w, BM, 2)
    token, inside, place = _own(group, part, H, W, R, G, GW, h, w, BM)
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
def _open(routes, region, R, K, BM: tl.constexpr):
    """The routes of a query's region as bits."""
    word = tl.zeros([BM], tl.int64)
    for i in range(K):
        target = tl.load(routes + region * K + i, mask=region < R, other=0)
        word = word | (tl.full([BM], 1, tl.int64) << target)
    return word


@triton.jit
def _all(start, H, W, R, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, BN: tl.constexpr):
    """The next BN cells of all regions: tokens, which are inside, and their region counted from that of the first.

    Regions that do not exist are in no route.
    """
    flat = start + tl.arange(0, BN)
    region = flat // (h * w)
    token, inside = _token(region, flat % (h * w), H, W, GW, h, w)
    return token, inside & (region < R), region - start // (h * w)


@triton.jit
def _attend_dense(
    qkv, out, lse, routes, scale, H, W, R, M, K, qk_dim, qkv_batch, qkv_row, out_row,
    GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // M).to(tl.int64)
    head = tl.program_id(0) % M
    token, inside, region = _all(0, H, W, R, GW, h, w, BM)
    word = _open(routes + image * R * K, region, R, K, BM)
    qkv += image * qkv_batch
    q = _load(qkv + head * DQ, token, inside, qkv_row, DQ, BQ)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for start in range(0, R * h * w, BN):
        other, there, ahead = _all(start, H, W, R, GW, h, w, BN)
        k = _load(qkv + qk_dim + head * DQ, other, there, qkv_row, DQ, BQ)
        v = _load(qkv + 2 * qk_dim + head * DV, other, there, qkv_row, DV, BV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        here = (word >> (start // (h * w))).to(tl.int32)
        s = tl.where((here[:, None] >> ahead[None, :]) & 1 != 0, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    total = tl.where(inside, total, 1.0)
    _store(out + image * H * W * out_row + head * DV, acc / total[:, None], token, inside, out_row, DV, BV)
    tl.store(lse + (image * M + head) * H * W + token, top + tl.log2(total), mask=inside)


@triton.jit
def _differentiate_dense(
    grad, qkv, out, lse, d_qkv, routes, scale, H, W, R, M, K, qk_dim, grad_batch, grad_row, qkv_batch, qkv_row, d_row,
    out_row, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // M).to(tl.int64)
    head = tl.program_id(0) % M
    token, inside, region = _all(0, H, W, R, GW, h, w, BM)
    word = _open(routes + image * R * K, region, R, K, BM)
    qkv += image * qkv_batch
    d_qkv += image * H * W * d_row
    q = _load(qkv + head * DQ, token, inside, qkv_row, DQ, BQ)
    g = _load(grad + image * grad_batch + head * DV, token, inside, grad_row, DV, BV)
    delta = _delta(_load(out + image * H * W * out_row + head * DV, token, inside, out_row, DV, BV), g)
    log2_scale = scale * 1.4426950408889634
    dq = tl.zeros([BM, BQ], tl.float32)
    for start in range(0, R * h * w, BN):
        other, there, ahead = _all(start, H, W, R, GW, h, w, BN)
        k = _load(qkv + qk_dim + head * DQ, other, there, qkv_row, DQ, BQ)
        v = _load(qkv + 2 * qk_dim + head * DV, other, there, qkv_row, DV, BV)
        # loaded in every step to free registers, which an A100 would spill
        norm = tl.load(lse + (image * M + head) * H * W + token, mask=inside, other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale - norm[:, None])
        here = (word >> (start // (h * w))).to(tl.int32)
        p = tl.where((here[:, None] >> ahead[None, :]) & 1 != 0, p, 0.0)
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        _store(d_qkv + 2 * qk_dim + head * DV, dv, other, there, d_row, DV, BV)
        ds = (p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        _store(d_qkv + qk_dim + head * DQ, dk * scale, other, there, d_row, DQ, BQ)
    _store(d_qkv + head * DQ, dq * scale, token, inside, d_row, DQ, BQ)


def is_dense(regions: int, cells: int, widest: int) -> bool:
    """Tiny regions of a small map, whose queries of one head fit one program and whose routes fit 63 bits."""
    return cells < 16 and regions < 64 and power_of_2(regions * cells) * power_of_2(widest) <= 8192


def dense_tiles(tokens: int, small: bool) -> tuple[int, int, int]:
    """Rows, columns of a step, and warps of a program that holds all queries of a head; `small` steps for the backward
    pass and exact float32 products.

    With 256 rows, two programs fit the registers of a multiprocessor: 16 warps of 64 forward, 8 of 128 backward.
    """
    rows = power_of_2(tokens)
    return rows, 16 if small else 32, max(4, rows // (32 if small else 16))


def tiles(cells: int, widest: int, dtype: torch.dtype, backward: bool) -> tuple[int, int, int, int]:
    """Regions and rows of a tile, columns of a step, and warps.

    64 rows are what a tensor core takes at once, and as many as a tile of several small regions fills; large regions
    take 128, which halves what their keys cost. Exact float32 products hold their operands in registers: half of it.
    """
    exact = dtype == torch.float32
    most = 32 if exact else 128 if cells >= 128 and widest <= 64 else 64
    regions = max(1, min(16, most // cells))
    rows = min(most, power_of_2(regions * cells))
    if exact:
        return regions, rows, 32 if widest <= 32 else 16, 4 if widest <= 64 else 8
    return regions, rows, 64 if widest <= (32 if backward else 64) else 32, max(2, rows // 16)


def region_means(x: Tensor, grid: tuple[int, int], region: tuple[int, int]) -> Tensor:
    """(B, R, C) in float32."""
    (B, _, C), (H, W), (h, w) = x.shape, grid, region
    x, GW = rows(x), triton.cdiv(W, w)
    R = triton.cdiv(H, h) * GW
    out = torch.empty(B, R, C, dtype=torch.float32, device=x.device)
    BC = min(128, power_of_2(C))
    BT = min(2048 // BC, power_of_2(h * w, least=1))
    launch(
        _means, (B * R, triton.cdiv(C, BC)), x, out, H, W, C, R, x.stride(0), x.stride(1), GW, h=h, w=w, BT=BT, BC=BC
    )
    return out


def select_regions(q: Tensor, k: Tensor, topk: int, scale: float) -> Tensor:
    """(B, R, topk), best first."""
    B, R, C = q.shape
    routes = torch.empty(B, R, topk, dtype=torch.int64, device=q.device)
    BR = power_of_2(R)
    launch(
        _select, (B * triton.cdiv(R, 16),), q.contiguous(), k.contiguous(), routes, R, C, topk, scale,
        BM=16, BR=BR, BC=16, warps=max(4, BR // 64),
    )  # fmt: skip
    return routes


class _Plan:
    """Sizes, tiles and lists that forward and backward share."""

    def __init__(self, qkv, routes, grid, region, heads, qk_dim, scale, *, backward) -> None:
        (self.B, _, channels), (H, W), (h, w) = qkv.shape, grid, region
        self.routes = routes.contiguous()
        self.R, self.K = routes.shape[1:]
        self.size, self.heads, self.qk_dim = (H, W, self.R, heads), heads, qk_dim
        self.scale = qk_dim**-0.5 if scale is None else scale
        DQ, DV = qk_dim // heads, (channels - 2 * qk_dim) // heads
        self.dense = is_dense(self.R, h * w, max(DQ, DV))
        self.G, BM, BN, self.warps = tiles(h * w, max(DQ, DV), qkv.dtype, backward)
        if self.dense:
            BM, BN, self.warps = dense_tiles(self.R * h * w, backward or qkv.dtype == torch.float32)
        self.groups = triton.cdiv(self.R, self.G)
        self.programs = self.groups * triton.cdiv(self.G * h * w, BM)
        self.constants = {
            "GW": triton.cdiv(W, w), "h": h, "w": w, "DQ": DQ, "DV": DV, "BM": BM, "BN": BN, "BQ": power_of_2(DQ),
            "BV": power_of_2(DV), "PRECISION": precision(qkv.dtype),
        }  # fmt: skip

    def lists(self, *, backward: bool) -> list:
        """Where each group of regions is routed to, and, for the backward pass, from where."""
        B, R, K, G, device = self.B, self.R, self.K, self.G, self.routes.device
        forward, size = G > 1, min(R, G * K)
        if not forward and not backward:
            return [None, None]
        routed = torch.empty(B, self.groups, size if forward else 0, dtype=torch.int32, device=device)
        routing = torch.empty(B, self.groups, R if backward else 0, dtype=torch.int32, device=device)
        counts = torch.empty(2, B, self.groups, dtype=torch.int32, device=device)
        launch(
            _list_routes, (B * self.groups,), self.routes, routed, counts[0], routing, counts[1], R, K, self.groups,
            size, G=G, BR=min(1024, power_of_2(R)), FORWARD=forward, BACKWARD=backward,
        )  # fmt: skip
        return [routed, counts[0], *([routing, counts[1]] if backward else [])]


def forward(
    qkv: Tensor,
    routes: Tensor,
    grid: tuple[int, int],
    region: tuple[int, int],
    heads: int,
    qk_dim: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention (B, N, C) without LePE, and the base 2 logarithm of each softmax's denominator (B, M, N)."""
    qkv, plan = rows(qkv), _Plan(qkv, routes, grid, region, heads, qk_dim, scale, backward=False)
    B, N, channels = qkv.shape
    out = torch.empty(B, N, channels - 2 * qk_dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, heads, N, dtype=torch.float32, device=qkv.device)
    tensors, strides = (qkv, out, lse, plan.routes), (qkv.stride(0), qkv.stride(1), out.stride(1))
    if plan.dense:
        launch(
            _attend_dense, (B * heads,), *tensors, plan.scale * LOG2E, *plan.size, plan.K, qk_dim, *strides,
            **plan.constants, warps=plan.warps,
        )  # fmt: skip
    else:
        launch(
            _attend, (B * heads * plan.programs,), *tensors, *plan.lists(backward=False), plan.scale * LOG2E,
            *plan.size, qk_dim, plan.groups, min(plan.R, plan.G * plan.K), *strides,
            K=plan.K, G=plan.G, **plan.constants, warps=plan.warps,
        )  # fmt: skip
    return out, lse


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
    plan = _Plan(qkv, routes, grid, region, heads, qk_dim, scale, backward=True)
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    tensors = (grad, qkv, out, lse, d_qkv, plan.routes)
    strides = (grad.stride(0), grad.stride(1), qkv.stride(0), qkv.stride(1), d_qkv.stride(1), out.stride(1))
    if plan.dense:
        launch(
            _differentiate_dense, (qkv.shape[0] * heads,), *tensors, plan.scale, *plan.size, plan.K, qk_dim, *strides,
            **plan.constants, warps=plan.warps, stages=1,
        )  # fmt: skip
    else:
        launch(
            _differentiate, (qkv.shape[0] * heads * 2 * plan.programs,), *tensors, *plan.lists(backward=True),
            plan.scale, *plan.size, qk_dim, plan.groups, min(plan.R, plan.G * plan.K), *strides,
            K=plan.K, G=plan.G, BK=min(32, plan.constants["BN"]), **plan.constants, warps=plan.warps,
        )  # fmt: skip
    return d_qkv


def add_lepe(out: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """out + the depth-wise convolution of v, in a new tensor: the backward pass needs attention alone."""
    total = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    return depthwise_conv.forward(v, weight, bias, total, (*grid, 0), residual=out)


def lepe_gradients(grad: Tensor, v: Tensor, dv: Tensor, weight: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Those of weight and bias; that of v is added to dv."""
    grad = rows(grad)
    depthwise_conv.input_gradient(grad, weight, dv, (*grid, 0), add=True)
    return depthwise_conv.weight_gradient(grad, v, weight, (*grid, 0))
