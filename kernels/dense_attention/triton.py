"""Triton kernels of `kernels.dense_attention`: forward, and what the backward shares with it.

A program owns a tile of queries and goes through all keys, a step at a time. Sigmoid weights are final at once: there
is no maximum, no sum, and nothing is kept for the backward. Clipped ones need the softmax's sum first: a pass over the
keys for it, then one for the weights and the output. Keys beyond the last have values of zero, so that only sums of
weights mind them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.channels import added, load_head, no_head, products, split, store_head
from kernels.device.launch import launch, power_of_2, precision, rows
from kernels.device.softmax import LOG2E, scaled_softmax


@triton.jit
def place_of(N, M: tl.constexpr, OWN: tl.constexpr):
    """Rows that this program owns, image, head, and number of the pair of both."""
    tiles = tl.cdiv(N, OWN)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    own = tl.program_id(0) % tiles * OWN + tl.arange(0, OWN)
    return own, pair // M, (pair % M).to(tl.int32), pair


@triton.jit
def shifted(bias, shift, head, LEARNED: tl.constexpr):
    """The bias of a head in base 2: learned, or the number that it is."""
    if LEARNED:
        shift = tl.load(bias + head).to(tl.float32)
    return shift * LOG2E


@triton.jit
def probability(z, level, CLIPPED: tl.constexpr):
    """2^z over its sum, of which `level` is the log2; or the sigmoid, with `level` added."""
    if CLIPPED:
        return tl.exp2(z - level)
    root = tl.rsqrt(1.0 + tl.exp2(-(z + level)))  # of 1 / (1 + e): a division takes a dozen instructions
    return root * root


@triton.jit
def weight(p, gamma, zeta, CLIPPED: tl.constexpr):
    if CLIPPED:
        p = tl.minimum(tl.maximum(p * (zeta - gamma) + gamma, 0.0), 1.0)
    return p


@triton.jit
def _forward(
    qkv, bias, out, lse, N, batch, row, scale, shift, gamma, zeta,
    M: tl.constexpr, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    CLIPPED: tl.constexpr, LEARNED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    own, image, head, pair = place_of(N, M, OWN)
    mine = own < N
    q = qkv + image * batch + head * D
    k = q + M * D
    v = k + M * D
    queries = load_head(q, own, row, mine, D, A, R)
    if CLIPPED:
        top = tl.full([OWN], float("-inf"), tl.float32)
        total = tl.zeros([OWN], tl.float32)
        for start in range(0, N, STEP):
            n = start + tl.arange(0, STEP)
            s = products(queries, load_head(k, n, row, n < N, D, A, R), R, PRECISION)
            if not EVEN:
                s = tl.where((n < N)[None, :], s, float("-inf"))
            _, _, top, total = scaled_softmax(s, scale, top, total)
        log = top * scale + tl.log2(total)
        tl.store(lse + pair * N + own, log, mask=mine)
        level = log[:, None]
    else:
        level = shifted(bias, shift, head, LEARNED)
    o = no_head(OWN, A, R)
    for start in range(0, N, STEP):
        n = start + tl.arange(0, STEP)
        s = products(queries, load_head(k, n, row, n < N, D, A, R), R, PRECISION)
        w = weight(probability(s * scale, level, CLIPPED), gamma, zeta, CLIPPED)
        o = added(o, w.to(qkv.dtype.element_ty), load_head(v, n, row, n < N, D, A, R), R, PRECISION)
    store_head(o, 1.0, out + image * N * (M * D) + head * D, own, M * D, mine, D, A, R)


def tiles(backward: bool, tokens: int, head_dim: int, itemsize: int) -> dict:
    """Rows that a program owns, rows of a step, warps and stages.

    As large as registers allow: on sm_80, where products have an operand there, some widths of heads spill up to 40
    bytes. In float32 products have no tensor cores and keep both operands in registers.
    """
    wide, narrow = head_dim > 96, head_dim <= 32
    if itemsize == 4:
        found = (32, 32, 4, 2) if backward else (64, 64, 8, 2) if narrow else (32, 16 if wide else 64, 8, 2)
    elif backward:
        found = (64, 32, 4, 2) if head_dim > 64 else (128, 64 if narrow else 32, 8, 2)
    else:
        found = (128, 64, 8, 2) if wide else (128, 64 if narrow else 32, 4, 3)
    own, step, warps, stages = found
    most = power_of_2(tokens)
    sizes = {"OWN": min(own, most), "STEP": min(step, most)}
    return sizes | {"warps": 4 if most < own else warps, "stages": stages}


def forward(
    qkv: Tensor, bias: Tensor | None, lse: Tensor | None, heads: int, numbers: tuple[float, float, float, float]
) -> Tensor:
    """The output; `lse` gets the log2 of the softmax's sum, and is None for sigmoid weights.

    `numbers`: scale of the logits, the bias of sigmoid weights, γ and ζ of clipped ones.
    """
    qkv = rows(qkv)
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = torch.empty(B, N, C, dtype=qkv.dtype, device=qkv.device)
    constants = constants_of(qkv, heads, bias, lse is not None)
    sizes = tiles(False, N, C // heads, qkv.element_size())
    scale, *others = numbers
    given = (qkv, numbers_of(bias, qkv), out, numbers_of(lse, qkv), N, qkv.stride(0), qkv.stride(1))
    launch(
        _forward, (B * heads * triton.cdiv(N, sizes["OWN"]),), *given, scale * LOG2E.value, *others,
        EVEN=N % sizes["STEP"] == 0, **sizes, **constants,
    )  # fmt: skip
    return out


def numbers_of(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """Next to each other; any tensor in the place of one that the kernel does not touch."""
    return instead if tensor is None else tensor.reshape(-1).contiguous()


def constants_of(qkv: Tensor, heads: int, bias: Tensor | None, clipped: bool) -> dict:
    """Constants of every kernel."""
    D = qkv.shape[2] // 3 // heads
    A, R = split(D)
    kind = {"CLIPPED": clipped, "LEARNED": bias is not None}
    return {"M": heads, "D": D, "A": A, "R": R, "PRECISION": precision(qkv.dtype), **kind}
