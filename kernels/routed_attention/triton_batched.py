"""Small regions of `kernels.routed_attention` in half precision, as batches of products: one for each region of a tile.

Each region meets the keys of its own routes and no others, where a tile of `triton` visits what any of its regions is
routed to: on routes as smooth as those of images two to three times as much. No lists are needed.

Shapes: G regions of a tile; T cells of a region, 16 or 32; S = J·T keys of the next J of a region's K routes.
"""

import triton
import triton.language as tl

from kernels.device.softmax import LOG2E


@triton.jit
def _tokens_of(region_GS, cell_S, H, W, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """Where cells of regions are in the image, and whether they are inside."""
    y = region_GS // GW * h + (cell_S // w)[None, :]
    x = region_GS % GW * w + (cell_S % w)[None, :]
    return y * W + x, (y < H) & (x < W)


@triton.jit
def own_regions(group, H, W, R, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """The G regions of a tile, which exist, their tokens (G, T), and which of them are inside."""
    region = group * G + tl.arange(0, G)
    exists = region < R
    token, inside = _tokens_of(region[:, None] + tl.zeros([1, h * w], tl.int32), tl.arange(0, h * w), H, W, GW, h, w)
    return region, exists, token, inside & exists[:, None]


@triton.jit
def _routed_to(
    routes, region, exists, start, H, W, K: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    J: tl.constexpr,
):  # fmt: skip
    """The tokens (G, S) of the next J routes of each region, which are inside, and which of S belong to a route."""
    cell = tl.arange(0, J * h * w)
    place = start + cell // (h * w)
    routed = exists[:, None] & (place < K)[None, :]
    region = tl.load(routes + region[:, None] * K + place[None, :], mask=routed, other=0).to(tl.int32)
    token, inside = _tokens_of(region, cell % (h * w), H, W, GW, h, w)
    return token, inside & routed, place < K


@triton.jit
def load_batch(base, token, row, keep, D: tl.constexpr, BD: tl.constexpr):
    """The D channels of a head, (G, tokens, BD)."""
    d = tl.arange(0, BD)
    keep = keep[:, :, None] & (d < D)[None, None, :]
    return tl.load(base + token[:, :, None] * row + d[None, None, :], mask=keep, other=0.0)


@triton.jit
def store_batch(base, token, row, keep, value, D: tl.constexpr, BD: tl.constexpr):
    """The counterpart of `load_batch`."""
    d = tl.arange(0, BD)
    keep = keep[:, :, None] & (d < D)[None, None, :]
    tl.store(base + token[:, :, None] * row + d[None, None, :], value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def attend_batched(
    qkv, out, lse, routes, scale, H, W, R, M, qk_dim, groups, qkv_batch, qkv_row, out_row, K: tl.constexpr,
    G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr,
    J: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = h * w
    group = tl.program_id(0) % groups
    head = tl.program_id(0) // groups % M
    image = (tl.program_id(0) // (groups * M)).to(tl.int64)
    region, exists, token, inside = own_regions(group, H, W, R, G, GW, h, w)
    qkv += image * qkv_batch
    routes += image * R * K
    q = load_batch(qkv + head * DQ, token, qkv_row, inside, DQ, BQ)
    top = tl.full([G, T], float("-inf"), tl.float32)
    total = tl.zeros([G, T], tl.float32)
    acc = tl.zeros([G, T, BV], tl.float32)
    for start in range(0, K, J):
        other, there, routed = _routed_to(routes, region, exists, start, H, W, K, GW, h, w, J)
        k = load_batch(qkv + qk_dim + head * DQ, other, qkv_row, there, DQ, BQ)
        v = load_batch(qkv + 2 * qk_dim + head * DV, other, qkv_row, there, DV, BV)
        s = tl.dot(q, tl.permute(k, (0, 2, 1))) * scale
        if K % J != 0:
            s = tl.where(routed[None, None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 2))
        p = tl.exp2(s - higher[:, :, None])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(p, 2)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, :, None])
    o = acc * (1.0 / total)[:, :, None]
    store_batch(out + image * H * W * out_row + head * DV, token, out_row, inside, o, DV, BV)
    tl.store(lse + (image * M + head) * H * W + token, top + tl.log2(total), mask=inside)


@triton.jit
def query_gradients_batched(
    grad, q_base, k_base, v_base, out, lse, dq_base, routes, group, scale, H, W, R, grad_row, qkv_row, d_row, out_row,
    K: tl.constexpr, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, DQ: tl.constexpr,
    DV: tl.constexpr, J: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq of the G regions of a tile; `routes` are those of the image."""
    region, exists, token, inside = own_regions(group, H, W, R, G, GW, h, w)
    q = load_batch(q_base, token, qkv_row, inside, DQ, BQ)
    g = load_batch(grad, token, grad_row, inside, DV, BV)
    o = load_batch(out, token, out_row, inside, DV, BV)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 2)
    norm = tl.load(lse + token, mask=inside, other=0.0)
    dq = tl.zeros([G, h * w, BQ], tl.float32)
    for start in range(0, K, J):
        other, there, routed = _routed_to(routes, region, exists, start, H, W, K, GW, h, w, J)
        k = load_batch(k_base, other, qkv_row, there, DQ, BQ)
        v = load_batch(v_base, other, qkv_row, there, DV, BV)
        p = tl.exp2(tl.dot(q, tl.permute(k, (0, 2, 1))) * (scale * LOG2E) - norm[:, :, None])
        if K % J != 0:
            p = tl.where(routed[None, None, :], p, 0.0)
        ds = p * (tl.dot(g, tl.permute(v, (0, 2, 1))) - delta[:, :, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    store_batch(dq_base, token, d_row, inside, dq * scale, DQ, BQ)
