"""Triton kernels of `kernels.aggregated_attention`: forward; backward is a file beside.

A program takes one head and a tile of the map, BY × BX tokens, so that neighbours are mostly its own tokens: they are
read by shifted addresses, once per offset, from the cache. Logits of the T neighbours are the columns of one small
tensor, which lets them join the softmax of the pooled tokens, whose logits are matrix products in blocks of BP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregated_attention.constants import EPSILON
from kernels.device.launch import launch, power_of_2, precision, rows
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E, online_softmax

SMALLEST = tl.constexpr(EPSILON)


@triton.jit
def tokens_of_tile(tile, H, W, BY: tl.constexpr, BX: tl.constexpr):
    """Row and column of the tokens of a tile, and whether they are in the map."""
    r = tl.arange(0, BY * BX)
    across = tl.cdiv(W, BX)
    y = tile // across * BY + r // BX
    x = tile % across * BX + r % BX
    return y, x, (y < H) & (x < W)


@triton.jit
def inverse_norm(x):
    """1/‖x‖ of rows in float32."""
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), SMALLEST)


@triton.jit
def direction(x):
    """x̂ of rows, in float32."""
    x = x.to(tl.float32)
    return x * inverse_norm(x)[:, None]


@triton.jit
def unit(x):
    """x̂ and 1/‖x‖ of rows, in float32."""
    x = x.to(tl.float32)
    inverse = inverse_norm(x)
    return x * inverse[:, None], inverse


@triton.jit
def log_of_keys(y, x, H, W, P, R: tl.constexpr):
    """log(n): neighbours of (y, x) in the map, and pooled tokens. Finite for any y and x."""
    down = tl.maximum(tl.minimum(y + R, H - 1) - tl.maximum(y - R, 0) + 1, 0)
    across = tl.maximum(tl.minimum(x + R, W - 1) - tl.maximum(x - R, 0) + 1, 0)
    return tl.log((down * across + P).to(tl.float32))


@triton.jit
def load_vector(base, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.load(base + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def load_learned(tokens, head, D: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """The learned tokens of a head, (BD, BT)."""
    d = tl.arange(0, BD)
    t = tl.arange(0, BT)
    at = tokens + (head * D + d[:, None]) * T + t[None, :]
    return tl.load(at, mask=(d < D)[:, None] & (t < T)[None, :], other=0.0).to(tl.float32)


@triton.jit
def column(x, j):
    """x[:, j]"""
    t = tl.arange(0, x.shape[1])
    return tl.sum(tl.where(t[None, :] == j, x, 0.0), 1)


@triton.jit
def with_column(x, j, column):
    t = tl.arange(0, x.shape[1])
    return tl.where(t[None, :] == j, column[:, None], x)


@triton.jit
def around(base, j, token, y, x, inside, row, H, W, D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr):
    """Neighbour j of every token of a tile, and whether it is in the map."""
    dy = j // WINDOW - WINDOW // 2
    dx = j % WINDOW - WINDOW // 2
    there = inside & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
    return load_rows(base, token + dy * W + dx, row, there, D, BD), there


# Neighbours come a row of the window at a time: all of them at once would take too many registers.


@triton.jit
def local_logits(
    raised, reach, keys, local_bias, token, y, x, inside, row, H, W,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """s of the neighbours in base 2, one column each; -inf outside of the map."""
    s = tl.full([raised.shape[0], BT], float("-inf"), tl.float32)
    for i in range(WINDOW):
        for dx in tl.static_range(WINDOW):
            j = i * WINDOW + dx
            k, there = around(keys, j, token, y, x, inside, row, H, W, D, BD, WINDOW)
            k = k.to(tl.float32)
            bias = tl.load(local_bias + j).to(tl.float32) * LOG2E
            s_j = tl.sum(raised * k, 1) * (inverse_norm(k) * reach * LOG2E) + bias
            s = with_column(s, j, tl.where(there, s_j, float("-inf")))
    return s


@triton.jit
def with_local(
    o, weight, values, token, y, x, inside, row, H, W,
    D: tl.constexpr, BD: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """o plus the neighbours times the columns of `weight`; UNIT takes their directions."""
    for i in range(WINDOW):
        for dx in tl.static_range(WINDOW):
            j = i * WINDOW + dx
            v, _there = around(values, j, token, y, x, inside, row, H, W, D, BD, WINDOW)
            v = v.to(tl.float32)
            weight_j = column(weight, j)
            if UNIT:
                weight_j *= inverse_norm(v)
            o += weight_j[:, None] * v
    return o


@triton.jit
def load_bias(pool_bias, token, p, inside, P):
    """B of tokens and pooled tokens in base 2; 0 where there are none."""
    mask = inside[:, None] & (p < P)[None, :]
    return tl.load(pool_bias + token[:, None] * P + p[None, :], mask=mask, other=0.0).to(tl.float32) * LOG2E


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
    y, x, inside = tokens_of_tile(tile, H, W, BY, BX)
    token = y * W + x
    q = direction(load_rows(base, token, row, inside, D, BD))
    raised = q + load_vector(embedding + first, D, BD)[None, :]
    reach = tl.load(scale + head).to(tl.float32) * log_of_keys(y, x, H, W, P, R)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BD], tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        k = direction(load_rows(kv_pool, p, pool_row, p < P, D, BD))
        v = load_rows(kv_pool + C, p, pool_row, p < P, D, BD)
        s = tl.dot(raised, tl.trans(k), input_precision=IP) * (reach * LOG2E)[:, None]
        s = tl.where((p < P)[None, :], s + load_bias(pool_bias, token, p, inside, P), float("-inf"))
        a, kept, top, total = online_softmax(s, top, total, False)
        o = o * kept[:, None] + tl.dot(a.to(v.dtype), v, input_precision=IP)
    s = local_logits(raised, reach, base + C, local_bias + head * T, token, y, x, inside, row, H, W, D, BD, BT, WINDOW)
    a, kept, top, total = online_softmax(s, top, total, False)
    learned = tl.dot(q, load_learned(tokens, head, D, T, BD, BT), input_precision=IP)
    learned += load_vector(token_bias + head * T, T, BT)[None, :]
    weight = a / total[:, None] + learned
    o *= (kept / total)[:, None]
    o = with_local(o, weight, base + 2 * C, token, y, x, inside, row, H, W, D, BD, WINDOW, False)
    if GATES:
        gate = tl.load(gates + (image * (H * W) + token) * M + head, mask=inside, other=0.0)
        o *= gate.to(tl.float32)[:, None]
    store_rows(out + image * (H * W * C) + first, token, C, inside, o, D, BD)
    tl.store(lse + (image * M + head) * (H * W) + token, top + tl.log2(total), mask=inside)


def shape_of_tile(grid: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Rows and columns of a tile: the shape that covers the map with the fewest, the squarest of those."""
    across = 1 << (tokens.bit_length() // 2)
    shapes = [(tokens // side, side) for side in (across, across // 2, across * 2)]
    return min(shapes, key=lambda shape: triton.cdiv(grid[0], shape[0]) * triton.cdiv(grid[1], shape[1]))


def forward(
    qkv: Tensor, kv_pool: Tensor, parameters: tuple, grid: tuple[int, int], window: int
) -> tuple[Tensor, Tensor]:
    """The output (B, N, C), and the logarithm of the sum of each softmax, (B, M, N) in base 2."""
    qkv, kv_pool, given = rows(qkv), rows(kv_pool), contiguous(parameters, qkv)
    (B, N, _), M, P = qkv.shape, given[0].shape[0], kv_pool.shape[1]
    out = torch.empty(B, N, qkv.shape[2] // 3, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, M, N, dtype=torch.float32, device=qkv.device)
    constants = constants_of(qkv, M, grid, window, parameters[-1] is not None)
    launch(
        _forward, (B * tiles_of(grid, constants) * M,), qkv, kv_pool, *given, out, lse, M, *grid, P,
        *qkv.stride()[:2], *kv_pool.stride()[:2], **constants,
    )  # fmt: skip
    return out, lse


def contiguous(parameters: tuple, instead: Tensor) -> tuple[Tensor, ...]:
    return tuple(instead if p is None else p.contiguous() for p in parameters)


def tiles_of(grid: tuple[int, int], constants: dict) -> int:
    return triton.cdiv(grid[0], constants["BY"]) * triton.cdiv(grid[1], constants["BX"])


def constants_of(qkv: Tensor, M: int, grid: tuple[int, int], window: int, gated: bool, *, pooled: bool = False) -> dict:
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
