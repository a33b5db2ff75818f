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

from kernels.depthwise_conv import triton as depthwise_conv
from kernels.device.launch import launch, power_of_2, precision, rows

MULTIPROCESSORS = 132  # of the GPU that the shares are made for; others only get more or fewer rounds
WITH_MEANS = 4  # rows of the state of "inline" besides D: means of k and v less their shifts, and the shifts


@triton.jit
def _place(N, span, chunks, groups, per, M):
    """Image, share, first and past-the-last token, first and past-the-last head of this program."""
    work = tl.program_id(0)
    group = work % groups
    chunk = work // groups % chunks
    image = (work // groups // chunks).to(tl.int64)
    return image, chunk, chunk * span, tl.minimum(chunk * span + span, N), group * per, tl.minimum(group * per + per, M)


@triton.jit
def _load(x, n, row, c, mask):
    return tl.load(x + n[:, None] * row + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _operand(x, PRECISION: tl.constexpr):
    """Rounded to the 11 bits that tensor cores look at in TF32; they would cut the others off. NaN stays NaN."""
    if PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x


@triton.jit
def _inverse(scale, c, live):
    """1 / scale, and 0 for channels that are none: their features are 0."""
    return tl.where(live, 1.0 / tl.load(scale + c, mask=live, other=1.0).to(tl.float32), 0.0)


@triton.jit
def _positive(x, inverse):
    return (tl.where(x < 0.0, 0.0, x) + 1e-6) * inverse[None, :]


@triton.jit
def _power(u, POWER: tl.constexpr):
    """u^POWER for u from 0 to 1."""
    if POWER == 1.0:
        y = u
    elif POWER == 2.0:
        y = u * u
    elif POWER == 3.0:
        y = u * u * u
    elif POWER == 4.0:
        y = u * u * (u * u)
    else:
        # the smallest constant that Triton 3.6 still takes for float32: below 2^-126 it computes in float64
        y = tl.exp2(POWER * tl.log2(tl.maximum(u, 1.2e-38)))
    return y


@triton.jit
def _focus(x, row, position, scale, stats, plane, start, stop, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
           POWER: tl.constexpr, POSITION: tl.constexpr):  # fmt: skip
    """Of every token 1 / max(b) and ‖b‖ / ‖(b / max(b))^p‖: f(b) is the product of (b / max(b))^p and the latter."""
    c = tl.arange(0, BC)
    live = c < C
    inverse = _inverse(scale, c, live)
    for first in range(start, stop, BP):
        n = first + tl.arange(0, BP)
        inside = (n < stop)[:, None] & live[None, :]
        value = _load(x, n, row, c, inside)
        if POSITION:
            value += _load(position, n, C, c, inside)
        b = _positive(value, inverse)
        shrink = 1.0 / tl.max(b, 1)
        u = b * shrink[:, None]
        w = _power(u, POWER)
        factor = tl.sqrt(tl.sum(u * u, 1) / tl.sum(w * w, 1)) / shrink
        tl.store(stats + n, shrink, mask=n < stop)
        tl.store(stats + plane + n, factor, mask=n < stop)
    tl.debug_barrier()


@triton.jit
def _feature(x, inverse, stats, plane, n, there, FEATURE: tl.constexpr, POWER: tl.constexpr):
    """The feature of one head; "focused" gives 0 for tokens that are none."""
    if FEATURE == "focused":
        shrink = tl.load(stats + n, mask=there, other=0.0)
        factor = tl.load(stats + plane + n, mask=there, other=0.0)
        x = _power(_positive(x, inverse) * shrink[:, None], POWER) * factor[:, None]
    elif FEATURE == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif FEATURE == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    return x


@triton.jit
def _through_feature(grad, x, phi, b, pull, FEATURE: tl.constexpr, POWER: tl.constexpr):
    """Gradient of x from that of its feature; for "focused" also of log b.

    pull is Σ grad·phi / ‖b‖² over all channels of the token.
    """
    log_b = grad
    if FEATURE == "focused":
        log_b = POWER * phi * grad + pull[:, None] * (b * b - POWER * phi * phi)
        grad = tl.where(x > 0.0, log_b / (x + 1e-6), 0.0)
    elif FEATURE == "relu":
        grad = tl.where(x > 0.0, grad, 0.0)
    elif FEATURE == "elu":
        grad = tl.where(x > 0.0, grad, grad * phi)
    return grad, log_b


@triton.jit
def _state_of(state, h, D: tl.constexpr, BD: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr):
    """State of one head as an operand, its next two rows, and the shifts: see `_state`."""
    d = tl.arange(0, BD)
    live = d < D
    state += h * (D + EXTRA) * D
    S = _load(state, d, D, d, live[:, None] & live[None, :])
    z = tl.load(state + D * D + d, mask=live, other=0.0)
    m = z
    if EXTRA == 4:
        m = tl.load(state + D * D + D + d, mask=live, other=0.0)
        S -= z[:, None] * m[None, :]
        z += tl.load(state + D * D + 2 * D + d, mask=live, other=0.0)
        m += tl.load(state + D * D + 3 * D + d, mask=live, other=0.0)
    return _operand(S, PRECISION), z, m


@triton.jit
def _convolve(acc, x, row, taps, n, there, c, live, W, H, prefix, C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr):
    """acc + the convolution of tokens n of the map, or with FLIP the transposed one."""
    place = n - prefix
    y = place // W - K // 2
    col = place % W - K // 2
    there = there & (place >= 0)
    for dy in range(0, K):  # a loop of the machine: unrolled, its loads would take all registers
        line = there & (y + dy >= 0) & (y + dy < H)
        for dx in tl.static_range(K):
            seen = line & (col + dx >= 0) & (col + dx < W)
            value = _load(x, n + (dy - K // 2) * W + (dx - K // 2), row, c, seen[:, None] & live[None, :])
            tap = dy * K + dx
            if FLIP:
                tap = K * K - 1 - tap
            acc += value * tl.load(taps + tap * C + c, mask=live, other=0.0)[None, :]
    return acc


@triton.jit
def _state(
    qkv, scale, position, stats, state, N, span, chunks, groups, per, batch, row, plane, inverse_N, inverse_BT,
    M: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    FEATURE: tl.constexpr, POWER: tl.constexpr, POSITION: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(k)ᵀ v / N of a share of the tokens, and in the row below Σ φ(k) / N.

    For "inline" both are of k and v less shifts, and Σ v / N and the shifts follow: covariances do not cancel then. The
    shifts are means of the first tokens of the image, the same in all shares; the first share stores them.
    """
    image, chunk, start, stop, first, last = _place(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    k = qkv + image * batch + C
    v = k + C
    stats += 2 * plane + image * N
    if FEATURE == "focused":
        _focus(k, row, position, scale, stats, plane, start, stop, C, BP, BC, POWER, POSITION)
    t = tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = d < D
    for h in range(first, last):
        c = h * D + d
        inverse = live
        if FEATURE == "focused":
            inverse = _inverse(scale, c, live)
        if EXTRA == 4:
            seen = (t < N)[:, None] & live[None, :]
            k_shift = tl.sum(_load(k, t, row, c, seen), 0) * inverse_BT
            v_shift = tl.sum(_load(v, t, row, c, seen), 0) * inverse_BT
        acc = tl.zeros([BD, BD], tl.float32)
        z = tl.zeros([BT, BD], tl.float32)
        m = tl.zeros([BT, BD], tl.float32)
        for n0 in range(start, stop, BT):
            n = n0 + t
            inside = (n < stop)[:, None] & live[None, :]
            key = _load(k, n, row, c, inside)
            value = _load(v, n, row, c, inside)
            if EXTRA == 4:
                key = tl.where(inside, key - k_shift[None, :], 0.0)
                value = _operand(tl.where(inside, value - v_shift[None, :], 0.0), PRECISION)
                m += value
            else:
                if POSITION:
                    key += _load(position, n, C, c, inside)
                key = _feature(key, inverse, stats, plane, n, n < stop, FEATURE, POWER)
                key = tl.where(inside, key, 0.0)
            z += key
            acc = tl.dot(tl.trans(_operand(key, PRECISION)), value, acc, input_precision=PRECISION)
        out = state + ((image * chunks + chunk) * M + h) * (D + EXTRA) * D
        tl.store(out + d[:, None] * D + d[None, :], acc * inverse_N, mask=live[:, None] & live[None, :])
        tl.store(out + D * D + d, tl.sum(z, 0) * inverse_N, mask=live)
        if EXTRA == 4:
            tl.store(out + D * D + D + d, tl.sum(m, 0) * inverse_N, mask=live)
            tl.store(out + D * D + 2 * D + d, tl.where(chunk == 0, k_shift, 0.0), mask=live)
            tl.store(out + D * D + 3 * D + d, tl.where(chunk == 0, v_shift, 0.0), mask=live)


@triton.jit
def _output(
    qkv, scale, stats, state, taps, out, N, W, H, prefix, span, chunks, groups, per, batch, row, plane, taps_batch, eps,
    factor,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, FEATURE: tl.constexpr, POWER: tl.constexpr, NORMALISE: tl.constexpr, EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(q) S / (φ(q) z + eps), or φ(q) S · factor, for "inline" + the mean of v; + the convolution of v."""
    image, _chunk, start, stop, first, last = _place(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    q = qkv + image * batch
    out += image * N * C
    stats += image * N
    state += image * M * (D + EXTRA) * D
    if K > 0:
        taps += image * taps_batch
    if FEATURE == "focused":
        _focus(q, row, scale, scale, stats, plane, start, stop, C, BP, BC, POWER, False)
    d = tl.arange(0, BD)
    live = d < D
    for h in range(first, last):
        c = h * D + d
        inverse = live
        if FEATURE == "focused":
            inverse = _inverse(scale, c, live)
        S, z, m = _state_of(state, h, D, BD, EXTRA, PRECISION)
        for n0 in range(start, stop, BT):
            n = n0 + tl.arange(0, BT)
            inside = (n < stop)[:, None] & live[None, :]
            phi = _feature(_load(q, n, row, c, inside), inverse, stats, plane, n, n < stop, FEATURE, POWER)
            if BD > 32:
                o = tl.trans(tl.dot(tl.trans(S), tl.trans(_operand(phi, PRECISION)), input_precision=PRECISION))
            else:
                o = tl.dot(_operand(phi, PRECISION), S, input_precision=PRECISION)
            if NORMALISE:
                o /= (tl.sum(phi * z[None, :], 1) + eps)[:, None]
            else:
                o *= factor
            if EXTRA == 4:
                o += m[None, :]
            if K > 0:
                bias = tl.load(taps + K * K * C + c, mask=live, other=0.0)
                o += tl.where(n < prefix, 0.0, 1.0)[:, None] * bias[None, :]
                o = _convolve(o, q + 2 * C, row, taps, n, n < stop, c, live, W, H, prefix, C, K, False)
            tl.store(out + n[:, None] * C + c[None, :], o.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _query_gradient(phi, grad, S, z, eps, factor, NORMALISE: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of φ(q), that of φ(q) S, and minus that of φ(q) z."""
    # S on the left, in `_output` too if large: a warp holds some of its rows, but would hold all of a right factor
    through = tl.trans(tl.dot(S, tl.trans(grad), input_precision=PRECISION))
    if NORMALISE:
        over = 1.0 / (tl.sum(phi * z[None, :], 1) + eps)
        pull = tl.sum(through * phi, 1) * over
        through = (through - pull[:, None] * z[None, :]) * over[:, None]
        grad *= over[:, None]
        pull *= over
    else:
        through *= factor
        grad *= factor
        pull = tl.zeros_like(tl.sum(phi, 1))
    return through, grad, pull


@triton.jit
def _backward_q(
    qkv, grad, scale, stats, state, pulls, dqkv, dstate, dscale, N, span, chunks, groups, per, batch, row, grad_batch,
    grad_row, plane, eps, factor,
    M: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, FEATURE: tl.constexpr, POWER: tl.constexpr,
    NORMALISE: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries; of a share of the tokens that of the state, in the row below that of z or of the mean of
    v, and that of the scale.

    "focused": f is homogeneous, so Σ grad·phi over a head is eps times the gradient of 1 / (φ(q) z + eps).
    """
    image, chunk, start, stop, first, last = _place(N, span, chunks, groups, per, M)
    C: tl.constexpr = M * D
    q = qkv + image * batch
    grad += image * grad_batch
    dqkv += image * N * 3 * C
    stats += image * N
    pulls += image * N
    state += image * M * (D + EXTRA) * D
    t = tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = d < D
    if FEATURE == "focused":
        for n0 in tl.range(start, stop, BT):
            n = n0 + t
            total = tl.zeros([BT], tl.float32)
            square = tl.zeros([BT], tl.float32)
            for h in tl.range(0, tl.minimum(groups * per, M), num_stages=1):
                c = h * D + d
                inside = (n < stop)[:, None] & live[None, :]
                inverse = _inverse(scale, c, live)
                S, z, _unused = _state_of(state, h, D, BD, EXTRA, PRECISION)
                x = _load(q, n, row, c, inside)
                phi = _feature(x, inverse, stats, plane, n, n < stop, FEATURE, POWER)
                g = _load(grad, n, grad_row, c, inside)
                _unused, g, pull = _query_gradient(phi, g, S, z, eps, factor, NORMALISE, PRECISION)
                b = _positive(x, inverse)
                total += pull
                square += tl.sum(b * b, 1)
            tl.store(pulls + n, eps * total / square, mask=n < stop)
        tl.debug_barrier()
    for h in range(first, last):
        c = h * D + d
        inverse = live
        if FEATURE == "focused":
            inverse = _inverse(scale, c, live)
        S, z, _unused = _state_of(state, h, D, BD, EXTRA, PRECISION)
        acc = tl.zeros([BD, BD], tl.float32)
        below = tl.zeros([BD], tl.float32)
        scales = tl.zeros([BD], tl.float32)
        for n0 in range(start, stop, BT):
            n = n0 + t
            inside = (n < stop)[:, None] & live[None, :]
            x = _load(q, n, row, c, inside)
            phi = _feature(x, inverse, stats, plane, n, n < stop, FEATURE, POWER)
            g = _load(grad, n, grad_row, c, inside)
            if EXTRA == 4:
                below += tl.sum(g, 0)
            dphi, g, pull = _query_gradient(phi, g, S, z, eps, factor, NORMALISE, PRECISION)
            if NORMALISE:
                below -= tl.sum(pull[:, None] * phi, 0)
            b = x
            if FEATURE == "focused":
                b = _positive(x, inverse)
                pull = tl.load(pulls + n, mask=n < stop, other=0.0)
            dx, log_b = _through_feature(dphi, x, phi, b, pull, FEATURE, POWER)
            scales += tl.sum(log_b, 0)
            tl.store(dqkv + n[:, None] * 3 * C + c[None, :], dx.to(dqkv.dtype.element_ty), mask=inside)
            acc = tl.dot(tl.trans(_operand(phi, PRECISION)), _operand(g, PRECISION), acc, input_precision=PRECISION)
        out = dstate + ((image * chunks + chunk) * M + h) * (D + 1) * D
        tl.store(out + d[:, None] * D + d[None, :], acc, mask=live[:, None] & live[None, :])
        tl.store(out + D * D + d, below, mask=live)
        if FEATURE == "focused":
            tl.store(dscale + (image * chunks + chunk) * C + c, -scales * inverse, mask=live)


@triton.jit
def _backward_k(
    qkv, grad, scale, position, stats, state, dstate, taps, dqkv, dscale, N, W, H, prefix, chunks, groups, per, batch,
    row, grad_batch, grad_row, plane, taps_batch, inverse_N,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, FEATURE: tl.constexpr,
    POWER: tl.constexpr, POSITION: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of one tile, and that of the scale."""
    image, chunk, start, stop, first, last = _place(N, BT, chunks, groups, per, M)
    C: tl.constexpr = M * D
    k = qkv + image * batch + C
    v = k + C
    grad += image * grad_batch
    dk = dqkv + image * N * 3 * C + C
    stats += 2 * plane + image * N
    state += image * M * (D + EXTRA) * D
    dstate += image * M * (D + 1) * D
    if K > 0:
        taps += image * taps_batch
    n = start + tl.arange(0, BT)
    there = n < stop
    d = tl.arange(0, BD)
    live = d < D
    inside = there[:, None] & live[None, :]
    pull = tl.zeros([BT], tl.float32)
    if FEATURE == "focused":
        square = tl.zeros([BT], tl.float32)
        for h in range(0, tl.minimum(groups * per, M)):
            c = h * D + d
            inverse = _inverse(scale, c, live)
            dS, dz, _unused = _state_of(dstate, h, D, BD, 1, PRECISION)
            key = _load(k, n, row, c, inside)
            if POSITION:
                key += _load(position, n, C, c, inside)
            phi = _feature(key, inverse, stats, plane, n, there, FEATURE, POWER)
            value = _load(v, n, row, c, inside)
            dphi = tl.dot(value, tl.trans(dS), input_precision=PRECISION) + dz[None, :]
            b = _positive(key, inverse)
            pull += tl.sum(dphi * phi, 1) * inverse_N
            square += tl.sum(b * b, 1)
        pull /= square
    for h in range(first, last):
        c = h * D + d
        inverse = live
        if FEATURE == "focused":
            inverse = _inverse(scale, c, live)
        dS, dz, _unused = _state_of(dstate, h, D, BD, 1, PRECISION)
        key = _load(k, n, row, c, inside)
        value = _load(v, n, row, c, inside)
        if POSITION:
            key += _load(position, n, C, c, inside)
        if EXTRA == 4:
            _unused, k_mean, v_mean = _state_of(state, h, D, BD, EXTRA, PRECISION)
            value = _operand(value - v_mean[None, :], PRECISION)
            phi = key - k_mean[None, :]
        else:
            phi = _feature(key, inverse, stats, plane, n, there, FEATURE, POWER)
        dphi = tl.dot(value, tl.trans(dS), input_precision=PRECISION)
        if EXTRA != 4:
            dphi += dz[None, :]
        b = key
        if FEATURE == "focused":
            b = _positive(key, inverse)
        dkey, log_b = _through_feature(dphi * inverse_N, key, phi, b, pull, FEATURE, POWER)
        tl.store(dk + n[:, None] * 3 * C + c[None, :], dkey.to(dqkv.dtype.element_ty), mask=inside)
        if FEATURE == "focused":
            log_b = tl.where(inside, log_b, 0.0)
            tl.store(dscale + (image * chunks + chunk) * C + c, -tl.sum(log_b, 0) * inverse, mask=live)
        if BD > 64:  # read again: two forms of it at once would not fit in shared memory
            dS, dz, _unused = _state_of(dstate, h, D, BD, 1, PRECISION)
        dvalue = tl.dot(_operand(phi, PRECISION), dS, input_precision=PRECISION)
        if EXTRA == 4:
            dvalue += dz[None, :]
        dvalue *= inverse_N
        if K > 0:
            dvalue = _convolve(dvalue, grad, grad_row, taps, n, there, c, live, W, H, prefix, C, K, True)
        tl.store(dk + n[:, None] * 3 * C + C + c[None, :], dvalue.to(dqkv.dtype.element_ty), mask=inside)


@triton.jit
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


@triton.jit
def _correlate(grad, v, partial, N, W, H, prefix, C, splits, grad_batch, grad_row, v_batch, v_row,
               BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """One row of the 3×3 weight gradient of one image over a share of its tokens: (B, splits, C, 9)."""
    dy = tl.program_id(0) % 3
    split = tl.program_id(0) // 3 % splits
    image = (tl.program_id(0) // 3 // splits).to(tl.int64)
    grad += image * grad_batch
    v += image * v_batch
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = c < C
    acc0 = tl.zeros([BT, BC], tl.float32)
    acc1 = tl.zeros([BT, BC], tl.float32)
    acc2 = tl.zeros([BT, BC], tl.float32)
    for n0 in range(prefix + split * BT, N, splits * BT):
        n = n0 + tl.arange(0, BT)
        y = (n - prefix) // W + dy - 1
        x = (n - prefix) % W
        there = (n < N) & (y >= 0) & (y < H)
        near = n + (dy - 1) * W
        g = _load(grad, n, grad_row, c, there[:, None] & live[None, :])
        acc0 += g * _load(v, near - 1, v_row, c, (there & (x > 0))[:, None] & live[None, :])
        acc1 += g * _load(v, near, v_row, c, there[:, None] & live[None, :])
        acc2 += g * _load(v, near + 1, v_row, c, (there & (x < W - 1))[:, None] & live[None, :])
    out = partial + ((image * splits + split) * C + c) * 9 + dy * 3
    tl.store(out, tl.sum(acc0, 0).to(partial.dtype.element_ty), mask=live)
    tl.store(out + 1, tl.sum(acc1, 0).to(partial.dtype.element_ty), mask=live)
    tl.store(out + 2, tl.sum(acc2, 0).to(partial.dtype.element_ty), mask=live)


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
    constant: float, normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, N, C), state (B, M, D + 1 or 4, D), stats of the focused tokens (4, B, N), and the taps."""
    qkv = rows(qkv)
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    H, W, prefix = grid
    D, extra, together = C // M, _extra(feature), feature == "focused"
    out = torch.empty(B, N, C, dtype=qkv.dtype, device=qkv.device)
    stats = torch.empty((4, B, N) if together else 0, dtype=torch.float32, device=qkv.device)
    K = _side(weight, lepe_weight)
    taps = _taps(weight, bias, lepe_weight, lepe_bias, C, K, feature, qkv.device)
    common = _common(qkv, M, feature, constant) | {"EXTRA": extra}
    common |= {"BC": power_of_2(C), "BP": max(1, 4096 // power_of_2(C))}
    strides = (qkv.stride(0), qkv.stride(1), B * N)
    tile = tiles("state", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], max(8 * D, 512), together)
    partial = torch.empty(B, chunks, M, D + extra, D, dtype=torch.float32, device=qkv.device)
    launch(
        _state, (B * chunks * groups,), qkv, scale, _whole(position), stats, partial, N, span, chunks, groups, per,
        *strides, 1 / N, 1 / min(N, tile["BT"]), POSITION=position is not None, **common, **tile,
    )  # fmt: skip
    state = partial.sum(1) if chunks > 1 else partial.view(B, M, D + extra, D)
    tile = tiles("output", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], 128, together)
    launch(
        _output, (B * chunks * groups,), qkv, scale, stats, state, taps, out, N, W, H, prefix, span, chunks, groups,
        per, *strides, _per_image(taps), *_constants(feature, constant, normalise, N), K=K, NORMALISE=normalise,
        **common, **tile,
    )  # fmt: skip
    return out, state, stats, taps


def backward(
    grad: Tensor, qkv: Tensor, state: Tensor, stats: Tensor, taps: Tensor, scale: Tensor | None,
    position: Tensor | None, weight: Tensor | None, bias: Tensor | None, lepe_weight: Tensor | None,
    lepe_bias: Tensor | None, grid: tuple[int, int, int], M: int, feature: str, constant: float, normalise: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the packed projection and of the six parameters; empty ones for parameters that are None."""
    qkv, grad = rows(qkv), rows(grad)
    B, N, C = grad.shape
    H, W, prefix = grid
    D, together = C // M, feature == "focused"
    dqkv = torch.empty(B, N, 3 * C, dtype=qkv.dtype, device=qkv.device)
    common = _common(qkv, M, feature, constant) | {"EXTRA": _extra(feature)}
    strides = (qkv.stride(0), qkv.stride(1), grad.stride(0), grad.stride(1), B * N)
    tile, tile_k = tiles("backward_q", D, N), tiles("backward_k", D, N)
    span, chunks, groups, per = shares(B, N, M, tile["BT"], max(8 * D, 512), together)
    chunks_k = triton.cdiv(N, tile_k["BT"])
    partial = torch.empty(B, chunks, M, D + 1, D, dtype=torch.float32, device=qkv.device)
    pulls = torch.empty((B, N) if together else 0, dtype=torch.float32, device=qkv.device)
    dscale = torch.empty((B * (chunks + chunks_k), C) if together else 0, dtype=torch.float32, device=qkv.device)
    launch(
        _backward_q, (B * chunks * groups,), qkv, grad, scale, stats, state, pulls, dqkv, partial, dscale, N, span,
        chunks, groups, per, *strides, *_constants(feature, constant, normalise, N), NORMALISE=normalise, **common,
        **tile,
    )  # fmt: skip
    dstate = partial.sum(1) if chunks > 1 else partial
    _, _, groups, per = shares(B, N, M, tile_k["BT"], tile_k["BT"], together)
    launch(
        _backward_k, (B * chunks_k * groups,), qkv, grad, scale, _whole(position), stats, state, dstate, taps, dqkv,
        dscale[B * chunks :], N, W, H, prefix, chunks_k, groups, per, *strides, _per_image(taps), 1 / N,
        stages=1, K=_side(weight, lepe_weight), POSITION=position is not None, **common, **tile_k,
    )  # fmt: skip
    dposition = _none(qkv) if position is None else dqkv[:, :, C : 2 * C].sum(0, dtype=torch.float32)
    return (
        dqkv,
        _none(qkv) if scale is None else dscale.sum(0).to(scale.dtype),
        dposition if position is None else dposition.to(position.dtype),
        *_weight_gradients(grad, qkv[..., 2 * C :], weight, bias, lepe_weight, lepe_bias, grid, feature),
    )


def _common(qkv: Tensor, M: int, feature: str, constant: float) -> dict:
    power = float(constant) if feature == "focused" else 1.0
    # TF32 keeps as many bits as float16, which is not more than the results show
    exact = "tf32x3" if qkv.dtype == torch.float16 else precision(qkv.dtype)
    return {"M": M, "D": qkv.shape[2] // (3 * M), "FEATURE": feature, "POWER": power, "PRECISION": exact}


def _extra(feature: str) -> int:
    return WITH_MEANS if feature == "inline" else 1


def _constants(feature: str, constant: float, normalise: bool, N: int) -> tuple[float, float]:
    """eps, in terms of sums over tokens divided by N, and the factor of what is not normalised."""
    eps = 1e-6 if feature == "focused" else 1e-6 / N
    return eps, float(constant) if feature == "inline" else float(N)


def _whole(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _none(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def _side(weight: Tensor | None, lepe_weight: Tensor | None) -> int:
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
        _tap_rows, (triton.cdiv(channels, 128),), _whole(weight), _whole(bias), _whole(lepe_weight), _whole(lepe_bias),
        taps, channels, C, channels if images or weight is None else weight.shape[0],
        K=K, OWN=0 if weight is None else weight.shape[-1], BIAS=(bias is not None) + 2 * (lepe_bias is not None),
        MORE=lepe_weight is not None, BLOCK=128,
    )  # fmt: skip
    return taps


def _per_image(taps: Tensor) -> int:
    return taps.stride(0) if taps.dim() == 3 else 0


def _weight_gradients(grad, v, weight, bias, lepe_weight, lepe_bias, grid, feature: str) -> tuple[Tensor, ...]:
    """Of weight, bias, and those of the second convolution: parts and sums over heads of one gradient per channel."""
    parameters = (weight, bias, lepe_weight, lepe_bias)
    if weight is None and lepe_weight is None:
        return tuple(_none(v) for _ in parameters)
    if feature == "inline":
        return _dynamic_gradient(grad, v, weight, grid), _none(v), _none(v), _none(v)
    larger = max((w for w in (weight, lepe_weight) if w is not None), key=lambda w: w.shape[-1])
    total, total_bias = depthwise_conv.weight_gradient(grad, v, larger, grid)
    return tuple(_none(v) if p is None else _part(total if p.dim() == 4 else total_bias, p) for p in parameters)


def _part(total: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter that is shared by heads, and smaller than the convolution that it is part of."""
    if parameter.dim() == 4:
        edge = (total.shape[-1] - parameter.shape[-1]) // 2
        total = total[:, :, edge : total.shape[-1] - edge, edge : total.shape[-1] - edge]
    return total.unflatten(0, (-1, parameter.shape[0])).sum(0).to(parameter.dtype)


def _dynamic_gradient(grad: Tensor, v: Tensor, weight: Tensor, grid: tuple[int, int, int]) -> Tensor:
    B, N, C = grad.shape
    H, W, prefix = grid
    BC = min(128, power_of_2(C))
    BT = 1024 // BC
    blocks = triton.cdiv(C, BC)
    splits = max(1, min(4 * MULTIPROCESSORS // max(1, 3 * B * blocks), triton.cdiv(N, 4 * BT)))
    dtype = weight.dtype if splits == 1 else torch.float32
    partial = torch.empty(B, splits, C, 9, dtype=dtype, device=grad.device)
    launch(
        _correlate, (3 * B * splits, blocks), grad, v, partial, N, W, H, prefix, C, splits,
        grad.stride(0), grad.stride(1), v.stride(0), v.stride(1), BT=BT, BC=BC,
    )  # fmt: skip
    return (partial.sum(1).to(weight.dtype) if splits > 1 else partial).view(weight.shape)
