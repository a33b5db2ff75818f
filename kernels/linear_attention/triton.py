"""Triton kernels of `kernels.linear_attention`: two passes over the tokens forward, two and a convolution's backward.

Forward: `_state` reduces the keys and values of a share of the tokens to one D×D state per head; the shares are added
in a fixed order; `_output` reads the state with every query, and adds the convolution of the values before it stores.
Backward: `_backward_q` gives the gradient of the queries and, again in shares, that of the state; `_backward_k` those
of keys and values, with the transposed convolution. Everything else that they need is computed again.

The focused feature of a channel depends on all channels of its token. A program therefore goes through its tokens
twice: over all heads first, for what they share (two numbers per token, written to `stats`), then head by head; the
second time the tokens come from the cache. Between the two is a barrier: other threads read what was written. Programs
that share tokens write the same numbers.

Products run on tensor cores in TF32 with rounded operands, for float16 in three TF32 products: what cancels in the
gradients of features would show a rounding of features and states to the dtype of the activations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device.conv import convolve
from kernels.device.launch import MULTIPROCESSORS, launch, power_of_2, precision, rows
from kernels.linear_attention import EPS
from kernels.linear_attention.features import (
    feature_of,
    focus,
    inverse_of,
    load,
    operand,
    place_of_program,
    state_of,
)

WITH_MEANS = 4  # rows of the state of "inline" besides D: means of k and v less their shifts, and the shifts


@triton.jit(do_not_specialize=["plane"])
def _state(
    qkv, scale, position, stats, state, N, span, chunks, groups, per, batch, row, plane, inverse_N, inverse_BT,
    M: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    FOCUSED: tl.constexpr, POWER: tl.constexpr, POSITION: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(k)ᵀ v / N of a share of the tokens, and in the row below Σ φ(k) / N.

    For "inline" both are of k and v less shifts, and Σ v / N and the shifts follow: covariances do not cancel then. The
    shifts are means of the first tokens of the image, the same in all shares; the first share stores them.
    """
    image, chunk, start, stop, first, last = place_of_program(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    k = qkv + image * batch + C
    v = k + C
    stats += 2 * plane + image * N
    if FOCUSED:
        focus(k, row, position, scale, stats, plane, start, stop, C, BP, BC, POWER, POSITION)
    t = tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = d < D
    for h in range(first, last):
        c = h * D + d
        inverse = live
        if FOCUSED:
            inverse = inverse_of(scale, c, live)
        if not FOCUSED:
            seen = (t < N)[:, None] & live[None, :]
            k_shift = tl.sum(load(k, t, row, c, seen), 0) * inverse_BT
            v_shift = tl.sum(load(v, t, row, c, seen), 0) * inverse_BT
        acc = tl.zeros([BD, BD], tl.float32)
        z = tl.zeros([BT, BD], tl.float32)
        m = tl.zeros([BT, BD], tl.float32)
        for n0 in range(start, stop, BT):
            n = n0 + t
            inside = (n < stop)[:, None] & live[None, :]
            key = load(k, n, row, c, inside)
            value = load(v, n, row, c, inside)
            if not FOCUSED:
                key = tl.where(inside, key - k_shift[None, :], 0.0)
                value = operand(tl.where(inside, value - v_shift[None, :], 0.0), PRECISION)
                m += value
            else:
                if POSITION:
                    key += load(position, n, C, c, inside)
                key = feature_of(key, inverse, stats, plane, n, n < stop, FOCUSED, POWER)
                key = tl.where(inside, key, 0.0)
            z += key
            acc = tl.dot(tl.trans(operand(key, PRECISION)), value, acc, input_precision=PRECISION)
        out = state + ((image * chunks + chunk) * M + h) * (D + EXTRA) * D
        tl.store(out + d[:, None] * D + d[None, :], acc * inverse_N, mask=live[:, None] & live[None, :])
        tl.store(out + D * D + d, tl.sum(z, 0) * inverse_N, mask=live)
        if not FOCUSED:
            tl.store(out + D * D + D + d, tl.sum(m, 0) * inverse_N, mask=live)
            tl.store(out + D * D + 2 * D + d, tl.where(chunk == 0, k_shift, 0.0), mask=live)
            tl.store(out + D * D + 3 * D + d, tl.where(chunk == 0, v_shift, 0.0), mask=live)


@triton.jit(do_not_specialize=["plane"])
def _output(
    qkv, scale, stats, state, taps, out, N, W, H, prefix, span, chunks, groups, per, batch, row, plane, taps_batch, eps,
    factor,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, FOCUSED: tl.constexpr, POWER: tl.constexpr, EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(q) S / (φ(q) z + eps), or φ(q) S · factor, for "inline" + the mean of v; + the convolution of v."""
    image, _chunk, start, stop, first, last = place_of_program(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    q = qkv + image * batch
    out += image * N * C
    stats += image * N
    state += image * M * (D + EXTRA) * D
    if K > 0:
        taps += image * taps_batch
    if FOCUSED:
        focus(q, row, scale, scale, stats, plane, start, stop, C, BP, BC, POWER, False)
    d = tl.arange(0, BD)
    live = d < D
    for h in range(first, last):
        c = h * D + d
        inverse = live
        if FOCUSED:
            inverse = inverse_of(scale, c, live)
        S, z, m = state_of(state, h, D, BD, EXTRA, PRECISION)
        for n0 in range(start, stop, BT):
            n = n0 + tl.arange(0, BT)
            inside = (n < stop)[:, None] & live[None, :]
            phi = feature_of(load(q, n, row, c, inside), inverse, stats, plane, n, n < stop, FOCUSED, POWER)
            if BD > 32:
                o = tl.trans(tl.dot(tl.trans(S), tl.trans(operand(phi, PRECISION)), input_precision=PRECISION))
            else:
                o = tl.dot(operand(phi, PRECISION), S, input_precision=PRECISION)
            if FOCUSED:
                o /= (tl.sum(phi * z[None, :], 1) + eps)[:, None]
            else:
                o *= factor
            if not FOCUSED:
                o += m[None, :]
            if K > 0:
                bias = tl.load(taps + K * K * C + c, mask=live, other=0.0)
                o += tl.where(n < prefix, 0.0, 1.0)[:, None] * bias[None, :]
                o += convolve(
                    q + 2 * C + h * D, row, taps + h * D, n, n < stop, d, D, W, H, prefix, C, K, BT, BD, False
                )
            tl.store(out + n[:, None] * C + c[None, :], o.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["channels"])
def _tap_rows(weight, bias, more, more_bias, taps, channels, C, D,
              K: tl.constexpr, OWN: tl.constexpr, BIAS: tl.constexpr, MORE: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Weights (…, 1, k, k) as rows (k·k, C) with the bias below: of one, of heads, or of images; plus a 3×3 if MORE."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = c < channels
    out = taps + (c // C).to(tl.int64) * (K * K + 1) * C + c % C
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
        tl.store(out + tap * C, w, mask=live)


def tiles(kernel: str, D: int, N: int) -> dict:
    """Tokens BT and padded channels BD of a tile, and warps, such that what a thread holds fits in its registers."""
    BD = power_of_2(D)
    BT, warps = {
        "state": {32: (64, 4), 64: (64, 8), 128: (32, 8)},
        "output": {32: (64, 8), 64: (32, 8), 128: (32, 8)},
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
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    H, W, prefix = grid
    D, extra, together = C // M, extra_rows(feature), feature == "focused"
    out = torch.empty(B, N, C, dtype=qkv.dtype, device=qkv.device)
    stats = torch.empty((4, B, N) if together else 0, dtype=torch.float32, device=qkv.device)
    K = side_of(weight, lepe_weight)
    taps = _taps(weight, bias, lepe_weight, lepe_bias, C, K, feature, qkv.device)
    common = constants_of(qkv, M, feature, constant) | {"EXTRA": extra}
    common |= {"BC": power_of_2(C), "BP": max(1, 4096 // power_of_2(C))}
    strides = (qkv.stride(0), qkv.stride(1), B * N)
    tile = tiles("state", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], max(8 * D, 512), together)
    partial = torch.empty(B, chunks, M, D + extra, D, dtype=torch.float32, device=qkv.device)
    launch(
        _state, (B * chunks * groups,), qkv, scale, whole(position), stats, partial, N, span, chunks, groups, per,
        *strides, 1 / N, 1 / min(N, tile["BT"]), POSITION=position is not None, **common, **tile,
    )  # fmt: skip
    state = partial.sum(1) if chunks > 1 else partial.view(B, M, D + extra, D)
    tile = tiles("output", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], 128, together)
    launch(
        _output, (B * chunks * groups,), qkv, scale, stats, state, taps, out, N, W, H, prefix, span, chunks, groups,
        per, *strides, per_image(taps), EPS, constant, K=K,
        **common, **tile,
    )  # fmt: skip
    return out, state, stats, taps


def constants_of(qkv: Tensor, M: int, feature: str, constant: float) -> dict:
    power = float(constant) if feature == "focused" else 1.0
    # TF32 keeps as many bits as float16, which is not more than the results show
    exact = "tf32x3" if qkv.dtype == torch.float16 else precision(qkv.dtype)
    return {"M": M, "D": qkv.shape[2] // (3 * M), "FOCUSED": feature == "focused", "POWER": power, "PRECISION": exact}


def extra_rows(feature: str) -> int:
    return WITH_MEANS if feature == "inline" else 1


def whole(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def side_of(weight: Tensor | None, lepe_weight: Tensor | None) -> int:
    """k of the one convolution that does both; 0 without any."""
    return max((w.shape[-1] for w in (weight, lepe_weight) if w is not None), default=0)


def _taps(weight, bias, lepe_weight, lepe_bias, C: int, K: int, feature: str, device) -> Tensor:
    """Weights as (k·k + 1, C) with the bias last, for "inline" (B, k·k + 1, C); with the second convolution's."""
    if not K:
        return torch.empty(0, dtype=torch.float32, device=device)
    images = (weight.shape[0],) if feature == "inline" else ()
    taps = torch.empty(*images, K * K + 1, C, dtype=torch.float32, device=device)
    channels = taps.numel() // (K * K + 1)
    launch(
        _tap_rows, (triton.cdiv(channels, 128),), whole(weight), whole(bias), whole(lepe_weight), whole(lepe_bias),
        taps, channels, C, channels if images or weight is None else weight.shape[0],
        K=K, OWN=0 if weight is None else weight.shape[-1], BIAS=(bias is not None) + 2 * (lepe_bias is not None),
        MORE=lepe_weight is not None, BLOCK=128,
    )  # fmt: skip
    return taps


def per_image(taps: Tensor) -> int:
    return taps.stride(0) if taps.dim() == 3 else 0
