"""Triton kernels of `kernels.linear_attention`: two passes over the tokens forward, two and a convolution's backward.

Forward: `_state` reduces the keys and values of a share of the tokens to one D×D state per head; the shares are added
in a fixed order; `_output` reads the state with every query. Backward: `_backward_q` gives the gradient of the queries
and, again in shares, that of the state; `_backward_k` those of keys and values. Everything else that they need is
computed again. The convolution of "focused", whose weights all images share, is that of `kernels.depthwise_conv`: it
goes down rows of the map with its weights in registers, and adds to what is there. That of "inline", 3×3 weights of
each image, is added before the output is stored, and the transposed one before the gradient of the values is.

The focused feature of a channel depends on all channels of its token. A program therefore goes through its tokens
twice: over all heads first, for what they share (two numbers per token, written to `stats`), then head by head; the
second time the tokens come from the cache. Between the two is a barrier: other threads read what was written. Programs
that share tokens write the same numbers.

Products run on tensor cores in bfloat16, with an upper and a lower half of what is not in bfloat16 already: what
cancels in the gradients of features would show a rounding of features and states to the dtype of the activations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.depthwise_conv.triton import convolve_into
from kernels.device.conv import convolve, widened
from kernels.device.launch import MULTIPROCESSORS, launch, power_of_2, precision, rows
from kernels.device.memory import load_tile, store_tile
from kernels.linear_attention import EPS
from kernels.linear_attention.features import (
    feature_of,
    flipped,
    focus,
    inverse_of,
    operand,
    place_of_program,
    product,
    state_of,
)

WITH_MEANS = 4  # rows of the state of "inline" besides D: means of k and v less their shifts, and the shifts


@triton.jit(do_not_specialize=["plane"])
def _state(
    k, v, scale, position, stats, state, N, span, chunks, groups, per, batch, row, plane, inverse_N, inverse_BT,
    M: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    FOCUSED: tl.constexpr, POWER: tl.constexpr, POSITION: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(k)ᵀ v / N of a share of the tokens, and in the row below Σ φ(k) / N.

    For "inline" both are of k and v less shifts, and Σ v / N and the shifts follow: covariances do not cancel then. The
    shifts are means of the first tokens of the image, the same in all shares; the first share stores them.
    """
    image, chunk, start, stop, first, last = place_of_program(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    k += image * batch
    v += image * batch
    stats += 2 * plane + image * N
    if FOCUSED:
        focus(k, row, position, scale, stats, plane, start, stop, C, BP, BC, POWER, POSITION)
    t = tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = d < D
    for h in range(first, last):
        c = h * D + d
        if FOCUSED:
            inverse = inverse_of(scale, c, live)
        else:
            k_shift = tl.sum(widened(load_tile(k, t, row, c, t < N, live)), 0) * inverse_BT
            v_shift = tl.sum(widened(load_tile(v, t, row, c, t < N, live)), 0) * inverse_BT
        acc = tl.zeros([BD, BD], tl.float32)
        z = tl.zeros([BT, BD], tl.float32)
        m = tl.zeros([BT, BD], tl.float32)
        for n0 in range(start, stop, BT):
            n = n0 + t
            there = n < stop
            key = widened(load_tile(k, n, row, c, there, live))
            value = load_tile(v, n, row, c, there, live)
            if FOCUSED:
                if POSITION:
                    key += load_tile(position, n, C, c, there, live).to(tl.float32)
                b, slope = feature_of(key, inverse, stats, plane, n, there, POWER)
                key = slope * b
            else:
                inside = there[:, None] & live[None, :]
                key = tl.where(inside, key - k_shift[None, :], 0.0)
                value = tl.where(inside, widened(value) - v_shift[None, :], 0.0)
                m += value
            z += key
            acc = product(flipped(operand(key, PRECISION)), operand(value, PRECISION), acc, PRECISION)
        out = state + ((image * chunks + chunk) * M + h) * (D + EXTRA) * D
        tl.store(out + d[:, None] * D + d[None, :], acc * inverse_N, mask=live[:, None] & live[None, :])
        tl.store(out + D * D + d, tl.sum(z, 0) * inverse_N, mask=live)
        if not FOCUSED:
            tl.store(out + D * D + D + d, tl.sum(m, 0) * inverse_N, mask=live)
            tl.store(out + D * D + 2 * D + d, tl.where(chunk == 0, k_shift, 0.0), mask=live)
            tl.store(out + D * D + 3 * D + d, tl.where(chunk == 0, v_shift, 0.0), mask=live)


@triton.jit(do_not_specialize=["plane"])
def _output(
    q, v, scale, stats, state, taps, out, N, W, H, prefix, span, chunks, groups, per, batch, row, plane, eps, factor,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, FOCUSED: tl.constexpr, POWER: tl.constexpr, EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(q) S / (φ(q) z + eps); for "inline" q S · factor + the mean of v + the convolution of v."""
    image, _chunk, start, stop, first, last = place_of_program(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    q += image * batch
    out += image * N * C
    stats += image * N
    state += image * M * (D + EXTRA) * D
    if K > 0:
        v += image * batch
        taps += image * K * K * C
    if FOCUSED:
        focus(q, row, scale, scale, stats, plane, start, stop, C, BP, BC, POWER, False)
    d = tl.arange(0, BD)
    live = d < D
    for h in range(first, last):
        c = h * D + d
        S, z, m = state_of(state, h, D, BD, EXTRA, PRECISION)
        zero = tl.zeros([BT, BD], tl.float32)
        if FOCUSED:
            inverse = inverse_of(scale, c, live)
        for n0 in range(start, stop, BT):
            n = n0 + tl.arange(0, BT)
            there = n < stop
            x = load_tile(q, n, row, c, there, live)
            if FOCUSED:
                b, slope = feature_of(widened(x), inverse, stats, plane, n, there, POWER)
                phi = slope * b
                over = 1.0 / (tl.sum(phi * z[None, :], 1) + eps)
                o = product(operand(phi, PRECISION), S, zero, PRECISION) * over[:, None]
            else:
                o = product(operand(x, PRECISION), S, zero, PRECISION) * factor + m[None, :]
            if K > 0:
                o += convolve(v + h * D, row, taps + h * D, n, there, d, D, W, H, prefix, C, K, BT, BD, False)
            store_tile(out, n, C, c, there, live, o)


@triton.jit
def _tap_rows(weight, bias, more, more_bias, taps, C, D,
              K: tl.constexpr, OWN: tl.constexpr, BIAS: tl.constexpr, MORE: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Weights (D, 1, k, k) that all heads share as rows (k·k, C), with the bias below; plus a 3×3 of (C, …) if MORE."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    for tap in tl.static_range(K * K + 1):
        w = tl.zeros([BLOCK], tl.float32)
        y = tap // K - K // 2
        x = tap % K - K // 2
        if tap < K * K:
            if OWN > 0:
                edge = K // 2 - OWN // 2
                if (tap // K >= edge) & (tap // K < K - edge) & (tap % K >= edge) & (tap % K < K - edge):
                    place = (y + OWN // 2) * OWN + x + OWN // 2
                    w += tl.load(weight + c % D * (OWN * OWN) + place, mask=live, other=0.0).to(tl.float32)
            if MORE and (y >= -1 and y <= 1 and x >= -1 and x <= 1):
                w += tl.load(more + c * 9 + (y + 1) * 3 + x + 1, mask=live, other=0.0).to(tl.float32)
        else:
            if BIAS & 1:
                w += tl.load(bias + c % D, mask=live, other=0.0).to(tl.float32)
            if BIAS & 2:
                w += tl.load(more_bias + c, mask=live, other=0.0).to(tl.float32)
        tl.store(taps + tap * C + c, w, mask=live)


def tiles(kernel: str, D: int, N: int) -> dict:
    """Tokens BT and padded channels BD of a tile, and warps, such that what a thread holds fits in its registers."""
    BD = power_of_2(D)
    BT, warps = {
        "state": {32: (64, 4), 64: (64, 8), 128: (32, 8)},
        "output": {32: (64, 4), 64: (32, 8), 128: (32, 8)},
        "backward_q": {32: (64, 4), 64: (32, 8), 128: (16, 8)},
        "backward_k": {32: (64, 4), 64: (32, 4), 128: (16, 8)},
    }[kernel][max(32, BD)]
    return {"BT": min(BT, power_of_2(N)), "BD": BD, "warps": warps}


def shares(B: int, N: int, M: int, BT: int, span: int, together: bool) -> tuple[int, int, int, int]:
    """Tokens and number of the shares of an image, and groups of heads and heads in each.

    A share has `span` tokens where the batch is large; where it is not, as many as give every multiprocessor one. Heads
    that need all channels stay together as long as there are four programs for each: otherwise they repeat some work.
    """
    groups = 1 if together else M
    chunks = max(triton.cdiv(N, span), min(triton.cdiv(N, BT), MULTIPROCESSORS // max(1, B * groups)))
    span = triton.cdiv(N, chunks * BT) * BT
    chunks = triton.cdiv(N, span)
    per = triton.cdiv(M, min(M, max(groups, triton.cdiv(4 * MULTIPROCESSORS, max(1, B * chunks)))))
    return span, chunks, triton.cdiv(M, per), per


def forward(
    qkv: Tensor, scale: Tensor | None, position: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    lepe_weight: Tensor | None, lepe_bias: Tensor | None, grid: tuple[int, int, int], M: int, feature: str,
    constant: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, N, C), state (B, M, D + 1 or 4, D), stats of the focused tokens (4, B, N), and the taps."""
    qkv = rows(qkv)
    q, k, v = qkv.chunk(3, -1)
    (B, N, C), (H, W, prefix) = q.shape, grid
    D, extra, together = C // M, extra_rows(feature), feature == "focused"
    out = torch.empty(B, N, C, dtype=qkv.dtype, device=qkv.device)
    stats = torch.empty((4, B, N) if together else 0, dtype=torch.float32, device=qkv.device)
    common = constants_of(qkv, M, feature, constant) | {"EXTRA": extra}
    common |= {"BC": power_of_2(C), "BP": max(1, 4096 // power_of_2(C))}
    strides = (qkv.stride(0), qkv.stride(1), B * N)
    tile = tiles("state", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], max(8 * D, 512), together)
    partial = torch.empty(B, chunks, M, D + extra, D, dtype=torch.float32, device=qkv.device)
    launch(
        _state, (B * chunks * groups,), k, v, scale, whole(position), stats, partial, N, span, chunks, groups, per,
        *strides, 1 / N, 1 / min(N, tile["BT"]), POSITION=position is not None, **common, **tile,
    )  # fmt: skip
    state = partial.sum(1) if chunks > 1 else partial.view(B, M, D + extra, D)
    tile = tiles("output", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], 128, together)
    apart = together or weight is None
    launch(
        _output, (B * chunks * groups,), q, q if apart else v, scale, stats, state,
        q if apart else of_images(weight), out, N, W, H, prefix, span, chunks, groups, per, *strides, EPS, constant,
        K=0 if apart else weight.shape[-1], **common, **tile,
    )  # fmt: skip
    if not together or (weight is None and lepe_weight is None):
        return out, state, stats, torch.empty(0, dtype=torch.float32, device=qkv.device)
    taps = _taps(weight, bias, lepe_weight, lepe_bias, C)
    convolve_into(out, v, weight_of(taps), taps[-1], grid, other=out)
    return out, state, stats, taps


def constants_of(qkv: Tensor, M: int, feature: str, constant: float) -> dict:
    power = float(constant) if feature == "focused" else 1.0
    exact = "ieee" if precision(qkv.dtype) == "ieee" else "pairs"
    return {"M": M, "D": qkv.shape[2] // (3 * M), "FOCUSED": feature == "focused", "POWER": power, "PRECISION": exact}


def extra_rows(feature: str) -> int:
    return WITH_MEANS if feature == "inline" else 1


def whole(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _taps(weight, bias, lepe_weight, lepe_bias, C: int) -> Tensor:
    """Weights of the one convolution that does both as (k·k + 1, C), with the bias last."""
    given = [w for w in (weight, lepe_weight) if w is not None]
    K = max(w.shape[-1] for w in given)
    taps = torch.empty(K * K + 1, C, dtype=torch.float32, device=given[0].device)
    launch(
        _tap_rows, (triton.cdiv(C, 128),), whole(weight), whole(bias), whole(lepe_weight), whole(lepe_bias), taps,
        C, C if weight is None else weight.shape[0], K=K, OWN=0 if weight is None else weight.shape[-1],
        BIAS=(bias is not None) + 2 * (lepe_bias is not None), MORE=lepe_weight is not None, BLOCK=128,
    )  # fmt: skip
    return taps


def weight_of(taps: Tensor) -> Tensor:
    """The rows as a weight (C, 1, k, k), without a copy."""
    K = int((taps.shape[0] - 1) ** 0.5)
    return taps[:-1].t().unflatten(1, (1, K, K))


def of_images(weight: Tensor) -> Tensor:
    """Weights (B, C, k, k) as (B, k·k, C)."""
    return weight.flatten(2).mT.contiguous()
