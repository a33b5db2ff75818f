"""Triton kernels of `kernels.routed_attention`: attention along routes; its gradients and the routing are files beside.

Queries and keys are taken where the projection left them, in tiles of one of three kinds:
- lists (`_attend`, `_differentiate`): a tile holds the cells of a region, or several small regions. It visits the
  regions that any of its own are routed to, or for the gradients of keys those that are routed to any of its own. An
  entry of these lists is a region (16 bits) and which regions of the tile it concerns (16 bits); `_list_routes` makes
  them, each in increasing order, from the routes alone. A single region attends along its routes as they are.
- batched (`triton_batched`): regions of 16 or 32 cells in half precision, each with the keys of its own routes alone;
  the gradients of keys go along lists.
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
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E, online_softmax, scaled_softmax
from kernels.routed_attention.triton_batched import attend_batched


@triton.jit
def token_of(region, cell, H, W, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """Where a cell of a region is in the image, and whether it is inside."""
    y = region // GW * h + cell // w
    x = region % GW * w + cell % w
    return y * W + x, (y < H) & (x < W)


@triton.jit
def own_tile(
    group, part, H, W, R, G: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, BM: tl.constexpr
):
    """Tokens of a tile, which are inside, and the place of their region among the G regions of the tile."""
    flat = part * BM + tl.arange(0, BM)
    place = tl.minimum(flat // (h * w), G - 1)
    region = group * G + place
    token, inside = token_of(region, flat % (h * w), H, W, GW, h, w)
    return token, inside & (flat < G * h * w) & (region < R), place


@triton.jit
def listed(entries, start, count, H, W, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, BN: tl.constexpr):
    """The next BN cells of the listed regions: tokens, which are inside, which exist, and the bits of their region."""
    flat = start + tl.arange(0, BN)
    exists = flat < count
    entry = tl.load(entries + flat // (h * w), mask=exists, other=0)
    region = (entry & 0xFFFF).to(tl.int32)
    token, inside = token_of(region, flat % (h * w), H, W, GW, h, w)
    return token, inside & exists, exists, (entry >> 16).to(tl.int32)


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
def place_of_program(
    M, groups, G: tl.constexpr, h: tl.constexpr, w: tl.constexpr, BM: tl.constexpr, ROLES: tl.constexpr
):
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
    image, head, _role, group, part = place_of_program(M, groups, G, h, w, BM, 1)
    token, inside, place = own_tile(group, part, H, W, R, G, GW, h, w, BM)
    qkv += image * qkv_batch
    k_base = qkv + qk_dim + head * DQ
    v_base = qkv + 2 * qk_dim + head * DV
    q = load_rows(qkv + head * DQ, token, qkv_row, inside, DQ, BQ)
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
        other, there, exists, bits = listed(entries, start, count, H, W, GW, h, w, BN)
        k = load_rows(k_base, other, qkv_row, there, DQ, BQ)
        v = load_rows(v_base, other, qkv_row, there, DV, BV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        concerned = exists[None, :] if G == 1 else (bits[None, :] >> place[:, None]) & 1 != 0
        s = tl.where(concerned, s, float("-inf"))
        p, shrink, top, total = online_softmax(s, top, total, True)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    total = tl.where(inside, total, 1.0)
    store_rows(out + image * H * W * out_row + head * DV, token, out_row, inside, acc / total[:, None], DV, BV)
    tl.store(lse + (image * M + head) * H * W + token, top + tl.log2(total), mask=inside)


@triton.jit
def open_regions(routes, region, R: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """The routes of a query's region as bits; none for a region that does not exist. Worked out once per region."""
    source = tl.arange(0, BR)[:, None]
    place = tl.arange(0, BK)[None, :]
    there = (source < R) & (place < K)
    target = tl.load(routes + source * K + place, mask=there, other=0)
    words = tl.sum(tl.where(there, tl.full([BR, BK], 1, tl.int64) << target, 0), 1)
    return tl.where(region < R, tl.gather(words, tl.minimum(region, BR - 1), 0), 0)


@triton.jit
def all_cells(start, H, W, R, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, BN: tl.constexpr):
    """The next BN cells of all regions: tokens, which are inside, and their region counted from that of the first.

    Regions that do not exist are in no route.
    """
    flat = start + tl.arange(0, BN)
    region = flat // (h * w)
    token, inside = token_of(region, flat % (h * w), H, W, GW, h, w)
    ahead = region - start // (h * w)
    if BN % (h * w) == 0:
        ahead = tl.arange(0, BN) // (h * w)  # the same in every step
    return token, inside & (region < R), ahead


@triton.jit
def are_open(word, start, ahead, h: tl.constexpr, w: tl.constexpr):
    """Whether the cells of a step are in regions that the rows are routed to."""
    here = (word >> (start // (h * w))).to(tl.int32)
    return here[:, None] & (1 << ahead)[None, :] != 0


@triton.jit
def _dense_step(
    q, k_base, v_base, row, word, start, scale, top, total, acc, H, W, R, GW: tl.constexpr, h: tl.constexpr,
    w: tl.constexpr, DQ: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """The softmax so far with the next BN cells in it."""
    other, there, ahead = all_cells(start, H, W, R, GW, h, w, BN)
    k = load_rows(k_base, other, row, there, DQ, BQ)
    v = load_rows(v_base, other, row, there, DV, BV)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not FOLD:
        s *= scale
        scale = 1.0
    s = tl.where(are_open(word, start, ahead, h, w), s, float("-inf"))
    p, shrink, top, total = scaled_softmax(s, scale, top, total)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return top, total, acc


@triton.jit
def _attend_dense(
    qkv, out, lse, routes, scale, H, W, M, qk_dim, qkv_batch, qkv_row, out_row, R: tl.constexpr, K: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, GW: tl.constexpr, h: tl.constexpr, w: tl.constexpr, DQ: tl.constexpr,
    DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    cells: tl.constexpr = R * h * w
    parts: tl.constexpr = (cells + BM - 1) // BM
    part = tl.program_id(0) % parts
    head = tl.program_id(0) // parts % M
    image = (tl.program_id(0) // (parts * M)).to(tl.int64)
    token, inside, _ahead = all_cells(part * BM, H, W, R, GW, h, w, BM)
    region = (part * BM + tl.arange(0, BM)) // (h * w)
    word = open_regions(routes + image * R * K, region, R, K, BR, BK)
    qkv += image * qkv_batch
    k_base = qkv + qk_dim + head * DQ
    v_base = qkv + 2 * qk_dim + head * DV
    q = load_rows(qkv + head * DQ, token, qkv_row, inside, DQ, BQ)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    whole: tl.constexpr = cells // BN * BN if BT < BN else (cells + BN - 1) // BN * BN
    for start in range(0, whole, BN):
        top, total, acc = _dense_step(
            q, k_base, v_base, qkv_row, word, start, scale, top, total, acc, H, W, R, GW, h, w, DQ, DV, BN, BQ, BV,
            PRECISION, FOLD,
        )  # fmt: skip
    if whole < cells:
        top, total, acc = _dense_step(
            q, k_base, v_base, qkv_row, word, whole, scale, top, total, acc, H, W, R, GW, h, w, DQ, DV, BT, BQ, BV,
            PRECISION, FOLD,
        )  # fmt: skip
    if not FOLD:
        scale = 1.0
    total = tl.where(inside, total, 1.0)
    o = acc * (1.0 / total)[:, None]
    store_rows(out + image * H * W * out_row + head * DV, token, out_row, inside, o, DV, BV)
    tl.store(lse + (image * M + head) * H * W + token, top * scale + tl.log2(total), mask=inside)


def is_dense(regions: int, cells: int, widest: int) -> bool:
    """Tiny regions of a small map, whose queries of one head fit one program and whose routes fit 63 bits."""
    return cells < 16 and regions < 64 and power_of_2(regions * cells) * power_of_2(widest) <= 8192


def dense_tiles(
    tokens: int, cells: int, widest: int, dtype: torch.dtype, backward: bool
) -> tuple[int, int, int, int | None]:
    """Rows, columns of a step, warps, and registers of a thread at most.

    Forward, 128 rows have 8 warps and 64 keys in a step, a smaller one for what is left of the keys: two programs fit a
    multiprocessor, and sums are shrunk once for 64 keys. Backwards a program has all queries of a head.
    Exact float32 products hold their operands in registers: 256 rows take 16 keys. A step has at most 32 regions.
    """
    rows = power_of_2(tokens)
    if backward or dtype == torch.float32:
        return rows, 16, max(4, rows // 32), None
    rows = min(128, rows)
    narrow = widest <= 32
    step = min(64 if narrow and cells > 1 else 32, power_of_2(tokens))
    return rows, step, max(4, rows // 16), 128 if narrow else None


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


def batched(cells: int, topk: int, widest: int, step: int, dtype: torch.dtype) -> int:
    """Regions whose keys are a step of a batch; 0 where tiles go along lists: exact products, and wide heads, whose
    batches do not fit the registers.
    """
    if dtype == torch.float32 or cells not in (16, 32) or widest > 64:
        return 0
    return min(step // cells, triton.next_power_of_2(topk))


class Plan:
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
            BM, BN, self.warps, self.registers = dense_tiles(self.R * h * w, h * w, max(DQ, DV), qkv.dtype, backward)
        self.J = 0 if self.dense else batched(h * w, self.K, max(DQ, DV), BN, qkv.dtype)
        self.groups = triton.cdiv(self.R, self.G)
        self.programs = self.groups * triton.cdiv(self.G * h * w, BM)
        self.constants = {
            "GW": triton.cdiv(W, w), "h": h, "w": w, "DQ": DQ, "DV": DV, "BM": BM, "BN": BN, "BQ": power_of_2(DQ),
            "BV": power_of_2(DV), "PRECISION": precision(qkv.dtype),
        }  # fmt: skip

    def lists(self, *, backward: bool) -> list:
        """Where each group of regions is routed to, and, for the backward pass, from where."""
        B, R, K, G, device = self.B, self.R, self.K, self.G, self.routes.device
        forward, size = G > 1 and not self.J, min(R, G * K)
        if not forward and not backward:
            return [None, None]
        routed = torch.empty(B, self.groups, size if forward else 0, dtype=torch.int32, device=device)
        routing = torch.empty(B, self.groups, R if backward else 0, dtype=torch.int32, device=device)
        counts = [torch.empty(B, self.groups, dtype=torch.int32, device=device) for _ in range(2)]
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
    qkv, plan = rows(qkv), Plan(qkv, routes, grid, region, heads, qk_dim, scale, backward=False)
    B, N, channels = qkv.shape
    out = torch.empty(B, N, channels - 2 * qk_dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, heads, N, dtype=torch.float32, device=qkv.device)
    tensors, strides = (qkv, out, lse, plan.routes), (qkv.stride(0), qkv.stride(1), out.stride(1))
    if plan.dense:
        BM, BN = plan.constants["BM"], plan.constants["BN"]
        tokens = plan.R * region[0] * region[1]
        launch(
            _attend_dense, (B * heads * triton.cdiv(tokens, BM),), *tensors, plan.scale * LOG2E.value, *grid, heads,
            qk_dim, *strides, R=plan.R, K=plan.K, BR=power_of_2(plan.R), BK=power_of_2(plan.K, least=2),
            **plan.constants, BT=min(BN, power_of_2(tokens % BN or BN)),
            FOLD=plan.scale > 0, warps=plan.warps, stages=1, maxnreg=plan.registers,
        )  # fmt: skip
    elif plan.J:
        sizes = {name: plan.constants[name] for name in ("GW", "h", "w", "DQ", "DV", "BQ", "BV")}
        launch(
            attend_batched, (B * heads * plan.groups,), *tensors, plan.scale * LOG2E.value, *plan.size, qk_dim,
            plan.groups, *strides, K=plan.K, G=plan.G, J=plan.J, **sizes, warps=plan.warps,
        )  # fmt: skip
    else:
        launch(
            _attend, (B * heads * plan.programs,), *tensors, *plan.lists(backward=False), plan.scale * LOG2E.value,
            *plan.size, qk_dim, plan.groups, min(plan.R, plan.G * plan.K), *strides,
            K=plan.K, G=plan.G, **plan.constants, warps=plan.warps,
        )  # fmt: skip
    return out, lse


def add_lepe(out: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """out + the depth-wise convolution of v, in a new tensor: the backward pass needs attention alone."""
    total = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    return depthwise_conv.forward(v, weight, bias, total, (*grid, 0), residual=out)
