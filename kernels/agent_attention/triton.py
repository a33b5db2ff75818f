"""Triton kernels of `kernels.agent_attention`: forward; backward is a file beside.

Forward: one launch up to 256 tokens, two above, four where there are few images. A program per image and head pools the
agents, gathers V_A with an online softmax over tiles of tokens and, on small maps, answers the tokens too. Larger maps
are answered by a program per tile of tokens; where there are few images, the gathering is split over tokens as well and
combined in a fixed order. Pooling and its transpose are products with a matrix of zeros and ones, made from positions.

With bias tables one launch more in front, which pads them; with a convolution the weights are transposed first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.conv import convolve
from kernels.device.launch import MULTIPROCESSORS, launch, power_of_2, precision, rows
from kernels.device.memory import load_tile
from kernels.device.softmax import LOG2E, online_softmax

SIZES = ["H", "W", "P", "N"]  # of the map, by which is only divided
WHOLE = 256  # tokens up to which one program does everything for an image and a head


@triton.jit
def _tables(b1, b2, tables, M, N, b1_head, b1_agent, b1_token, b2_head, b2_agent, b2_token,
            A: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, BT: tl.constexpr, AP: tl.constexpr):  # fmt: skip
    """Both bias tables, in units of log 2, as (2, M, tokens, agents) filled up to whole tiles.

    The other kernels read them 128 bits at a time and without a mask. Tokens that fill B1 and agents that fill B2 have
    minus infinity; the rest of the filling is finite.
    """
    head = tl.program_id(0) % M
    t = tl.program_id(0) // M * BT + tl.arange(0, BT)
    a = tl.arange(0, AP)
    inside = (t < N)[:, None] & (a < A)[None, :]
    size = tl.cdiv(N, BT) * BT * AP
    place = t[:, None] * AP + a[None, :]
    if BIAS1:
        b = tl.load(b1 + head * b1_head + a[None, :] * b1_agent + t[:, None] * b1_token, mask=inside, other=0.0)
        b = tl.where((t < N)[:, None], b.to(tl.float32) * LOG2E, float("-inf"))
        tl.store(tables + head * size + place, b.to(tables.dtype.element_ty))
    if BIAS2:
        b = tl.load(b2 + head * b2_head + a[None, :] * b2_agent + t[:, None] * b2_token, mask=inside, other=0.0)
        b = tl.where((a < A)[None, :], b.to(tl.float32) * LOG2E, float("-inf"))
        tl.store(tables + (M + head) * size + place, b.to(tables.dtype.element_ty))


@triton.jit
def table_of(tables, which, M, head, t, a, N, BT: tl.constexpr, AP: tl.constexpr):
    """A piece of a table; a and t are shaped to broadcast."""
    size = tl.cdiv(N, BT) * BT * AP
    return tl.load(tables + (which * M + head) * size + t * AP + a).to(tl.float32)


@triton.jit
def _bin(a, H, W, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """First row, row after the last, first column and column after the last of the tokens that agent a averages."""
    i = a // ACROSS
    j = a % ACROSS
    return i * H // DOWN, ((i + 1) * H + DOWN - 1) // DOWN, j * W // ACROSS, ((j + 1) * W + ACROSS - 1) // ACROSS


@triton.jit
def within_bin(a, t, H, W, P, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """Whether token t is in the bin of agent a; a and t are shaped to broadcast."""
    top, bottom, left, right = _bin(a, H, W, DOWN, ACROSS)
    y = (t - P) // W
    x = (t - P) % W
    return (t >= P) & (y >= top) & (y < bottom) & (x >= left) & (x < right)


@triton.jit
def tokens_in_bin(a, H, W, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    top, bottom, left, right = _bin(a, H, W, DOWN, ACROSS)
    return ((bottom - top) * (right - left)).to(tl.float32)


@triton.jit
def choose(q, agents, tables, M, head, t, a, N, A, scale, BIAS: tl.constexpr, BT: tl.constexpr, AP: tl.constexpr,
            IP: tl.constexpr):  # fmt: skip
    """softmax(Q Aᵀ · scale + B2) of a tile, (tokens, agents)."""
    s = tl.dot(q, tl.trans(agents), input_precision=IP) * (scale * LOG2E)
    if BIAS:
        s += table_of(tables, 1, M, head, t[:, None], a[None, :], N, BT, AP)
    else:
        s = tl.where((a < A)[None, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * (1.0 / tl.sum(p, 1))[:, None]


@triton.jit
def _answer(
    qkv, row, tables, taps, conv_bias, out, agents, gathered, t, a, d, head, M, H, W, P, N, A, scale,
    D: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr, CONV_BIAS: tl.constexpr, BT: tl.constexpr, AP: tl.constexpr,
    DP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """What a tile of tokens reads from the agents, and the convolution of the values there."""
    q = load_tile(qkv, t, row, d, t < N, d < D)
    p = choose(q, agents, tables, M, head, t, a, N, A, scale, BIAS, BT, AP, IP)
    o = tl.dot(p.to(gathered.dtype), gathered, input_precision=IP)
    if K > 0:
        o += convolve(qkv + 2 * M * D, row, taps + head * D, t, t < N, d, D, W, H, P, M * D, K, BT, DP, False)
        if CONV_BIAS:
            b = tl.load(conv_bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)
            o += tl.where((t >= P)[:, None], b[None, :], 0.0)
    place = t[:, None] * (M * D) + d[None, :]
    tl.store(out + place, o.to(out.dtype.element_ty), mask=(t < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["H", "W", "P"])
def _pool(qkv, pooled, M, H, W, P, batch, row, D: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
          BT: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """One agent: the mean of its bin."""
    a = tl.program_id(0) % (DOWN * ACROSS)
    pair = (tl.program_id(0) // (DOWN * ACROSS)).to(tl.int64)
    d = tl.arange(0, DP)
    top, bottom, left, right = _bin(a, H, W, DOWN, ACROSS)
    qkv += pair // M * batch + pair % M * D
    acc = tl.zeros([BT, DP], tl.float32)
    for start in range(0, (bottom - top) * (right - left), BT):
        i = start + tl.arange(0, BT)
        y = top + i // (right - left)
        x = left + i % (right - left)
        inside = (y < bottom)[:, None] & (d < D)[None, :]
        acc += tl.load(qkv + (P + y * W + x)[:, None] * row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(acc, 0) / ((bottom - top) * (right - left)).to(tl.float32)
    tl.store(pooled + (pair * (DOWN * ACROSS) + a) * D + d, mean.to(pooled.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["pairs", *SIZES, "share"])
def _gather(
    qkv, tables, taps, conv_bias, pooled, gathered, lse, out, pairs, M, H, W, P, N, scale, share, batch, row,
    D: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, POOL: tl.constexpr, ANSWER: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, K: tl.constexpr, CONV_BIAS: tl.constexpr,
    BT: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """V_A of one image and head over a share of the tokens; with POOL the agents first, with ANSWER the tokens last."""
    A: tl.constexpr = DOWN * ACROSS
    pair = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % M
    a = tl.arange(0, AP)
    d = tl.arange(0, DP)
    C = M * D
    inside = (a < A)[:, None] & (d < D)[None, :]
    place = a[:, None] * D + d[None, :]
    qkv += pair // M * batch + head * D
    pooled += pair * A * D
    if POOL:
        total = tl.zeros([AP, DP], tl.float32)
        for start in range(0, N, BT):
            t = start + tl.arange(0, BT)
            q = load_tile(qkv, t, row, d, t < N, d < D)
            within = within_bin(a[:, None], t[None, :], H, W, P, DOWN, ACROSS)
            total += tl.dot(within.to(q.dtype), q, input_precision=IP)
        agents = (total / tokens_in_bin(a, H, W, DOWN, ACROSS)[:, None]).to(pooled.dtype.element_ty)
        tl.store(pooled + place, agents, mask=inside)
    else:
        agents = tl.load(pooled + place, mask=inside, other=0.0)
    highest = tl.full([AP], float("-inf"), tl.float32)
    weights = tl.zeros([AP], tl.float32)
    acc = tl.zeros([AP, DP], tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, N), BT):
        t = start + tl.arange(0, BT)
        k = load_tile(qkv + C, t, row, d, t < N, d < D)
        s = tl.dot(agents, tl.trans(k), input_precision=IP) * (scale * LOG2E)
        if BIAS1:
            s += table_of(tables, 0, M, head, t[None, :], a[:, None], N, BT, AP)
        else:
            s = tl.where((t < N)[None, :], s, float("-inf"))
        p, shrink, highest, weights = online_softmax(s, highest, weights, True)
        v = load_tile(qkv + 2 * C, t, row, d, t < N, d < D)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=IP)
    acc = acc * (1.0 / weights)[:, None]
    # one result per share of the tokens
    pair += tl.program_id(1).to(tl.int64) * pairs
    tl.store(gathered + pair * A * D + place, acc.to(gathered.dtype.element_ty), mask=inside)
    tl.store(lse + pair * A + a, highest + tl.log2(weights), mask=a < A)
    if ANSWER:
        out += tl.program_id(0).to(tl.int64) // M * N * C + head * D
        values = acc.to(agents.dtype)
        for start in range(0, N, BT):
            t = start + tl.arange(0, BT)
            _answer(
                qkv, row, tables, taps, conv_bias, out, agents, values, t, a, d, head, M, H, W, P, N, A, scale,
                D, BIAS2, K, CONV_BIAS, BT, AP, DP, IP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "splits"])
def _combine(parts, part_lse, gathered, lse, pairs, splits, D: tl.constexpr, A: tl.constexpr, AP: tl.constexpr,
             DP: tl.constexpr):  # fmt: skip
    """V_A from the results over shares of the tokens, each weighted by what its softmax would have had in the whole."""
    pair = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, AP)
    d = tl.arange(0, DP)
    inside = (a < A)[:, None] & (d < D)[None, :]
    place = a[:, None] * D + d[None, :]
    highest = tl.full([AP], float("-inf"), tl.float32)
    weights = tl.zeros([AP], tl.float32)
    acc = tl.zeros([AP, DP], tl.float32)
    for split in range(splits):
        at = pair + split * pairs
        part = tl.load(parts + at * A * D + place, mask=inside, other=0.0)
        log = tl.load(part_lse + at * A + a, mask=a < A, other=0.0)
        higher = tl.maximum(highest, log)
        shrink = tl.exp2(highest - higher)
        share = tl.exp2(log - higher)
        weights = weights * shrink + share
        acc = acc * shrink[:, None] + part * share[:, None]
        highest = higher
    acc = acc / weights[:, None]
    tl.store(gathered + pair * A * D + place, acc.to(gathered.dtype.element_ty), mask=inside)
    tl.store(lse + pair * A + a, highest + tl.log2(weights), mask=a < A)


@triton.jit(do_not_specialize=SIZES)
def _scatter(
    qkv, tables, taps, conv_bias, pooled, gathered, out, M, H, W, P, N, scale, batch, row,
    D: tl.constexpr, A: tl.constexpr, BIAS2: tl.constexpr, K: tl.constexpr, CONV_BIAS: tl.constexpr,
    BT: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The answers to one tile of tokens; heads of the same tokens next to each other, as in memory."""
    head = tl.program_id(0) % M
    tile = tl.program_id(0) // M
    tiles = tl.cdiv(N, BT)
    image = (tile // tiles).to(tl.int64)
    t = tile % tiles * BT + tl.arange(0, BT)
    a = tl.arange(0, AP)
    d = tl.arange(0, DP)
    inside = (a < A)[:, None] & (d < D)[None, :]
    place = (image * M + head) * A * D + a[:, None] * D + d[None, :]
    agents = tl.load(pooled + place, mask=inside, other=0.0)
    values = tl.load(gathered + place, mask=inside, other=0.0)
    _answer(
        qkv + image * batch + head * D, row, tables, taps, conv_bias, out + image * N * M * D + head * D,
        agents, values, t, a, d, head, M, H, W, P, N, A, scale, D, BIAS2, K, CONV_BIAS, BT, AP, DP, IP,
    )  # fmt: skip


def tiles(tokens: int, agents: int, head_dim: int, itemsize: int, *, backward: bool = False) -> dict:
    """Tokens, agents and channels of a tile, and warps.

    64 tokens are what a tensor core of sm_90 takes at once. Half where a program would not hold a row of tiles in its
    registers: wide agents or heads, float32, and in the backward pass already from 64 agents with 64 channels.
    """
    AP, DP = power_of_2(agents), power_of_2(head_dim)
    wide = max(AP, DP) > 64
    BT = 128 // itemsize // (2 if wide else 1) // (2 if backward and not wide and AP + DP > 96 else 1)
    return {"BT": min(max(BT, 16), power_of_2(tokens)), "AP": AP, "DP": DP, "warps": 8 if wide else 4}


def splits(pairs: int, tokens: int, tile: int) -> tuple[int, int]:
    """Over how many programs the tokens of an image and head are split, and the tokens of each of them.

    One where one program does everything, or where images and heads already fill a large GPU twice; else enough to
    fill it four times, each with at least two tiles.
    """
    if tokens <= WHOLE or pairs >= 2 * MULTIPROCESSORS:
        return 1, tokens
    count = max(1, min(triton.cdiv(4 * MULTIPROCESSORS, max(pairs, 1)), tokens // (2 * tile)))
    share = triton.cdiv(triton.cdiv(tokens, tile), count) * tile
    return triton.cdiv(tokens, share), share


def forward(
    qkv: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    grid: tuple[int, int, int],
    heads: int,
    agents: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result (B, N, C); for the backward pass the agents and V_A (B, M, A, D), and their log-sum-exp, base 2."""
    qkv, (H, W, P), (down, across) = rows(qkv), grid, agents
    (B, N, C), A = (qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3), down * across
    D, pairs = C // heads, B * heads
    tile = tiles(N, A, D, qkv.element_size())
    count, share = splits(pairs, N, tile["BT"])
    out = torch.empty(B, N, C, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, heads, A, dtype=torch.float32, device=qkv.device)
    gathered = torch.empty(B, heads, A, D, dtype=qkv.dtype, device=qkv.device)
    pooled, parts, part_lse = torch.empty_like(gathered), gathered, lse
    if count > 1:
        parts, part_lse = lse.new_empty((count, *gathered.shape)), lse.new_empty((count, *lse.shape))
        launch(
            _pool, (pairs * A,), qkv, pooled, heads, H, W, P, qkv.stride(0), qkv.stride(1),
            D=D, DOWN=down, ACROSS=across, BT=4096 // tile["DP"], DP=tile["DP"],
        )  # fmt: skip
    local = taps_of(qkv, weight), (qkv if bias is None else bias.contiguous())
    answer = {
        "BIAS2": scatter is not None, "K": 0 if weight is None else weight.shape[-1], "CONV_BIAS": bias is not None,
        "D": D, "IP": precision(qkv.dtype), **tile,
    }  # fmt: skip
    tables = padded_tables(qkv, gather, scatter, A, tile)
    sizes = heads, H, W, P, N, scale
    launch(
        _gather, (pairs, count), qkv, tables, *local, pooled, parts, part_lse, out, pairs, *sizes, share,
        qkv.stride(0), qkv.stride(1),
        DOWN=down, ACROSS=across, POOL=count == 1, BIAS1=gather is not None, ANSWER=N <= WHOLE, **answer,
    )  # fmt: skip
    if count > 1:
        launch(_combine, (pairs,), parts, part_lse, gathered, lse, pairs, count, D=D, A=A, AP=tile["AP"], DP=tile["DP"])
    if N > WHOLE:
        launch(
            _scatter, (B * triton.cdiv(N, tile["BT"]) * heads,), qkv, tables, *local, pooled, gathered, out,
            *sizes, qkv.stride(0), qkv.stride(1), A=A, **answer,
        )  # fmt: skip
    return out, pooled, gathered, lse


def padded_tables(qkv: Tensor, gather: Tensor | None, scatter: Tensor | None, agents: int, tile: dict) -> Tensor:
    """What `_tables` makes, in the dtype of qkv as the reference takes them; something harmless without tables."""
    if gather is None and scatter is None:
        return qkv
    heads, N = (gather.shape[0], gather.shape[2]) if gather is not None else scatter.shape[:2]
    count = triton.cdiv(N, tile["BT"])
    tables = torch.empty(2, heads, count * tile["BT"], tile["AP"], dtype=qkv.dtype, device=qkv.device)
    b1, b2 = qkv if gather is None else gather, qkv if scatter is None else scatter.mT
    launch(
        _tables, (count * heads,), b1, b2, tables, heads, N, *b1.stride(), *b2.stride(),
        A=agents, BIAS1=gather is not None, BIAS2=scatter is not None, BT=tile["BT"], AP=tile["AP"],
    )  # fmt: skip
    return tables


def taps_of(qkv: Tensor, weight: Tensor | None) -> Tensor:
    """The weights (k·k, C); something harmless without."""
    return qkv if weight is None else weight.flatten(1).t().contiguous()
