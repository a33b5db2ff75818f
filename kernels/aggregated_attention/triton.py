"""Triton kernels of `kernels.aggregated_attention`: forward; backward is a file beside.

A program takes one head and a block of G patches of 4×4 tokens. A patch and the halo of its neighbours are one small
matrix product on the tensor cores; the logits of a token's T neighbours are gathered from it into T columns, and its
weights are spread over the halo again for the product with the values: all between takes T columns. Logits of the
pooled tokens are matrix products in blocks of BP.

Products take keys and values as they are in memory; norms are factors of the results. What is not in memory is split
into a high and a low half for 16-bit products, which is more exact than TF32, and the other side is not converted.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregated_attention.constants import EPSILON
from kernels.aggregated_attention.patches import (
    CELLS,
    SIDE,
    along,
    blocks_of_patches,
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
from kernels.device.launch import launch, power_of_2, precision, rows
from kernels.device.memory import load_rows, store_rows
from kernels.device.softmax import LOG2E, online_softmax

SMALLEST = tl.constexpr(EPSILON)


@triton.jit
def inverse_norm(x):
    """1/‖x‖ of rows in float32."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(x * x, len(x.shape) - 1), SMALLEST * SMALLEST))


@triton.jit
def direction(x):
    """x̂ of rows, in float32."""
    return x.to(tl.float32) * inverse_norm(x)[:, None]


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
def load_learned(tokens, head, BD: tl.constexpr, BT: tl.constexpr):
    """The learned tokens of a head, as `prepared` padded them: (BD, BT)."""
    return tl.load(tokens + (head * BD + tl.arange(0, BD)[:, None]) * BT + tl.arange(0, BT)[None, :])


@triton.jit
def products_of_learned(raw, inverse, learned, IP: tl.constexpr):
    """q̂·t of the queries and the learned tokens: (BM, BT)."""
    if IP == "ieee":
        return tl.dot(raw * inverse[:, None], learned, input_precision=IP)
    high, low = halves(learned, raw.dtype)
    return tl.dot(raw, high, tl.dot(raw, low)) * inverse[:, None]


@triton.jit
def load_bias(pool_bias, token, p, inside, bias_row):
    """B of tokens and pooled tokens, as `padded` made it; 0 for tokens that are not in the map."""
    return tl.load(pool_bias + token[:, None] * bias_row + p[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _pooled(
    high, low, reach, kv_pool, pool_bias, token, inside, start, P, C, pool_row, bias_row,
    D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 to a block of pooled tokens, and their values."""
    p = start + tl.arange(0, BP)
    bias = load_bias(pool_bias, token, p, inside, bias_row)  # before the product: the sum takes the layout of the last
    k = load_rows(kv_pool, p, pool_row, p < P, D, BD)
    v = load_rows(kv_pool + C, p, pool_row, p < P, D, BD)
    s = product_of_halves(high, low, tl.trans(k), IP) * inverse_norm(k)[None, :]
    return s * reach[:, None] + bias, v


@triton.jit
def _forward(
    qkv, kv_pool, scale, embedding, local_bias, pool_bias, tokens, token_bias, gates, out, lse,
    M, H, W, P, bias_row, batch, row, pool_batch, pool_row,
    D: tl.constexpr, WINDOW: tl.constexpr, HALO: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, BP: tl.constexpr,
    BD: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, ALIGN: tl.constexpr, GATES: tl.constexpr, IP: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = WINDOW * WINDOW
    G: tl.constexpr = GY * GX
    BM: tl.constexpr = G * CELLS
    C = M * D
    batch, row = batch // ALIGN * ALIGN, row // ALIGN * ALIGN
    pool_batch, pool_row = pool_batch // ALIGN * ALIGN, pool_row // ALIGN * ALIGN
    head = tl.program_id(0) % M
    blocks = blocks_of_patches(H, W, GY, GX)
    block = tl.program_id(0) // M % blocks
    image = (tl.program_id(0) // M // blocks).to(tl.int64)
    first = head * D
    base = qkv + image * batch + first
    kv_pool += image * pool_batch + first
    pool_bias += head.to(tl.int64) * (H * W) * bias_row
    top_row, left = corners_of_patches(block, W, GY, GX)
    y, x, inside = tokens_of_patches(top_row, left, H, W)
    token = y * W + x
    q = load_rows(base, token, row, inside, D, BD)
    inverse = inverse_norm(q)
    high, low = halves(q * inverse[:, None] + load_vector(embedding + first, D, BD)[None, :], q.dtype)
    reach = tl.load(scale + head).to(tl.float32) * log_of_keys(y, x, H, W, P, WINDOW // 2) * LOG2E
    # the first block apart: a loop would carry the sums in the layout in which the bias is loaded
    s, v = _pooled(high, low, reach, kv_pool, pool_bias, token, inside, 0, P, C, pool_row, bias_row, D, BP, BD, IP)
    top = tl.max(s, 1)
    a = tl.exp2(s - top[:, None])
    total = tl.sum(a, 1)
    o = tl.dot(a.to(v.dtype), v, input_precision=IP)
    for start in range(BP, P if MORE else BP, BP):
        s, v = _pooled(
            high, low, reach, kv_pool, pool_bias, token, inside, start, P, C, pool_row, bias_row, D, BP, BD, IP
        )
        a, kept, top, total = online_softmax(s, top, total, False)
        o = tl.dot(a.to(v.dtype), v, o * kept[:, None], input_precision=IP)
    near, there = tokens_of_halos(top_row, left, H, W, WINDOW, HALO, BH)
    k = load_halos(base + C, near, row, there, D, BD)
    high, low = tl.reshape(high, (G, CELLS, BD)), tl.reshape(low, (G, CELLS, BD))
    s = product_of_halves(high, low, tl.permute(k, (0, 2, 1)), IP) * inverse_norm(k)[:, None, :]
    dy, dx = offset_of_class(WINDOW, BM, BT)
    seen = neighbours_in_map(y, x, inside, dy, dx, H, W, WINDOW, BT)
    bias = tl.load(local_bias + head * T + dy * WINDOW + dx, mask=seen, other=float("-inf")).to(tl.float32)
    s = gathered(s, WINDOW, HALO, BT, IP) * reach[:, None] + bias * LOG2E
    a, kept, top, total = online_softmax(s, top, total, False)
    learned = products_of_learned(q, inverse, load_learned(tokens, head, BD, BT), IP)
    learned += load_vector(token_bias + head * T, T, BT)[None, :]
    learned = tl.gather(learned, dy * WINDOW + dx, 1)
    share = 1.0 / total
    weight = tl.where(seen, a * share[:, None] + learned, 0.0)
    v = load_halos(base + 2 * C, near, row, there, D, BD)
    o = tl.reshape(o * (kept * share)[:, None], (G, CELLS, BD))
    o = tl.reshape(along(weight, v, o, WINDOW, HALO, IP), (BM, BD))
    if GATES:
        gate = tl.load(gates + image * (H * W * M) + head + token * M, mask=inside, other=0.0)
        o *= gate.to(tl.float32)[:, None]
    store_rows(out + image * (H * W * C) + first, token, C, inside, o, D, BD)
    lse += (image * M + head) * (H * W)
    tl.store(lse + token, top + tl.log2(total), mask=inside)


def forward(
    qkv: Tensor, kv_pool: Tensor, parameters: tuple, grid: tuple[int, int], window: int
) -> tuple[Tensor, Tensor]:
    """The output (B, N, C), and the logarithm of the sum of each softmax, (B, M, N) in base 2."""
    qkv, kv_pool = rows(qkv), rows(kv_pool)
    (B, N, _), M, P = qkv.shape, parameters[0].shape[0], kv_pool.shape[1]
    constants = constants_of((qkv, kv_pool), M, grid, window, parameters[-1] is not None)
    given = prepared(parameters, qkv, constants)
    out = torch.empty(B, N, qkv.shape[2] // 3, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, M, N, dtype=torch.float32, device=qkv.device)
    launch(
        _forward, (B * blocks_of(grid, constants) * M,), qkv, kv_pool, *given, out, lse, M, *grid, P,
        given[3].shape[2], *qkv.stride()[:2], *kv_pool.stride()[:2], MORE=constants["BP"] < P, **constants,
    )  # fmt: skip
    return out, lse


def prepared(parameters: tuple, instead: Tensor, constants: dict) -> tuple[Tensor, ...]:
    """The parameters, contiguous; those that are matrices fill whole blocks: the bias of pooled tokens in base 2, with
    -inf for those that there are not, and learned tokens with zeros."""
    scale, embedding, local_bias, pool_bias, tokens, *others = (
        instead if p is None else p.contiguous() for p in parameters
    )
    wide = -pool_bias.shape[2] % constants["BP"]
    bias = F.pad(pool_bias.float() * LOG2E.value, (0, wide), value=float("-inf"))
    _M, D, T = tokens.shape
    tokens = F.pad(tokens.float(), (0, constants["BT"] - T, 0, constants["BD"] - D))
    return scale, embedding, local_bias, bias, tokens, *others


def blocks_of(grid: tuple[int, int], constants: dict) -> int:
    """Blocks that cover a map."""
    return triton.cdiv(grid[0], SIDE.value * constants["GY"]) * triton.cdiv(grid[1], SIDE.value * constants["GX"])


def shape_of_block(grid: tuple[int, int], patches: int) -> tuple[int, int]:
    """Rows and columns of patches in a block: the shape that covers the map with the fewest, the squarest of those."""
    shapes = [(patches >> n, 1 << n) for n in range(patches.bit_length())]
    shapes.sort(key=lambda shape: abs(shape[0] - shape[1]))
    return min(shapes, key=lambda shape: blocks_of(grid, dict(zip(("GY", "GX"), shape, strict=True))))


def constants_of(activations: tuple[Tensor, ...], M: int, grid: tuple[int, int], window: int, gated: bool) -> dict:
    """Constants of a kernel, and its warps and stages: a patch is a warp's, and as many as fit shared memory.

    Exact products of float32 are plain multiplications, whose operands take more registers: four warps share a patch.
    Strides are multiples of ALIGN elements, which lets 16 bytes be loaded at once.
    """
    D = activations[0].shape[2] // (3 * M)
    BD, IP = power_of_2(D), precision(activations[0].dtype)
    across = SIDE.value + window - 1
    halo = 8 if 4 < across <= 8 else across  # rows of a power of two where the halo takes no more for it
    exact = IP == "ieee"
    patches = 1 if exact else max(1, min(4, 128 // BD))
    GY, GX = shape_of_block(grid, patches)
    return {
        **{"D": D, "WINDOW": window, "HALO": halo, "GY": GY, "GX": GX, "BP": 32 if exact else 64, "BD": BD},
        **{"BT": power_of_2(window**2), "BH": power_of_2(across * halo)},
        **{"ALIGN": math.gcd(8, *(s for t in activations for s in t.stride()[:2]))},
        **{"GATES": gated, "IP": IP, "warps": 4 if exact else patches, "stages": 1},
    }
