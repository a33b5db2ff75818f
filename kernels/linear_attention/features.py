"""Device functions of `kernels.linear_attention`: tokens and heads of a program, features, products, states."""

import triton
import triton.language as tl

from kernels.device.conv import widened


@triton.jit
def place_of_program(N, span, chunks, groups, per, M):
    """Image, share, first and past-the-last token, first and past-the-last head of this program."""
    work = tl.program_id(0)
    group = work % groups
    chunk = work // groups % chunks
    image = (work // groups // chunks).to(tl.int64)
    return image, chunk, chunk * span, tl.minimum(chunk * span + span, N), group * per, tl.minimum(group * per + per, M)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """What adds up to x in a product: x itself, or with "pairs" its upper half in bfloat16 and what is left of it.

    bfloat16 is its own upper half. Two of 8 bits each are more than the 11 of TF32, and take half the instructions.
    """
    if PRECISION == "ieee":
        parts = (x.to(tl.float32),)
    elif x.dtype == tl.bfloat16:
        parts = (x,)
    else:
        x = x.to(tl.float32)
        upper = (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        parts = (upper.to(tl.bfloat16), (x - upper).to(tl.bfloat16))
    return parts


@triton.jit
def flipped(parts):
    """Of every part its transpose."""
    turned = ()
    for i in tl.static_range(len(parts)):
        turned += (tl.trans(parts[i]),)
    return turned


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + the matrix product of two operands, without that of what both are short of."""
    IP: tl.constexpr = "ieee" if PRECISION == "ieee" else "tf32"  # for float32; parts in bfloat16 are exact
    if len(a) == 2:
        acc = tl.dot(a[1], b[0], acc, input_precision=IP)
    if len(b) == 2:
        acc = tl.dot(a[0], b[1], acc, input_precision=IP)
    return tl.dot(a[0], b[0], acc, input_precision=IP)


@triton.jit
def inverse_of(scale, c, live):
    """1 / scale, and 0 for channels that are none: their features are 0."""
    return tl.where(live, 1.0 / tl.load(scale + c, mask=live, other=1.0).to(tl.float32), 0.0)


@triton.jit
def positive(x, inverse):
    """b = (relu(x) + 1e-6) / scale."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) * inverse[None, :] + (1e-6 * inverse)[None, :]


@triton.jit
def _power(u, POWER: tl.constexpr):
    """u^POWER for u from 0 to 1."""
    if POWER == 0.0:
        y = tl.full(u.shape, 1.0, tl.float32)
    elif POWER == 1.0:
        y = u
    elif POWER == 2.0:
        y = u * u
    elif POWER == 3.0:
        y = u * u * u
    else:
        # the smallest constant that Triton 3.6 still takes for float32: below 2^-126 it computes in float64
        y = tl.exp2(POWER * tl.log2(tl.maximum(u, 1.2e-38)))
    return y


@triton.jit
def focus(x, row, position, scale, stats, plane, start, stop, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
           POWER: tl.constexpr, POSITION: tl.constexpr):  # fmt: skip
    """Of every token s = 1 / max(b) and r = ‖s b‖ / ‖(s b)^p‖: f(b) is r (s b)^(p - 1) b."""
    c = tl.arange(0, BC)
    live = c < C
    inverse = inverse_of(scale, c, live)
    for first in range(start, stop, BP):
        n = first + tl.arange(0, BP)
        inside = (n < stop)[:, None] & live[None, :]
        value = widened(tl.load(x + n[:, None] * row + c[None, :], mask=inside, other=0.0))
        if POSITION:
            value += tl.load(position + n[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        b = positive(value, inverse)
        shrink = 1.0 / tl.max(b, 1)
        u = b * shrink[:, None]
        w = _power(u, POWER - 1.0) * u
        ratio = tl.sqrt(tl.sum(u * u, 1) / tl.sum(w * w, 1))
        tl.store(stats + n, shrink, mask=n < stop)
        tl.store(stats + plane + n, ratio, mask=n < stop)
    tl.debug_barrier()


@triton.jit
def feature_of(x, inverse, stats, plane, n, there, POWER: tl.constexpr):
    """b of one head, and its feature over b, which is 0 for tokens that are none."""
    shrink = tl.load(stats + n, mask=there, other=0.0)
    ratio = tl.load(stats + plane + n, mask=there, other=0.0)
    b = positive(x, inverse)
    return b, _power(b * shrink[:, None], POWER - 1.0) * ratio[:, None]


@triton.jit
def through_feature(grad, x, b, slope, inverse, pull, POWER: tl.constexpr):
    """Gradients of x and of log b, from POWER times that of the feature, which is slope · b.

    pull is Σ gradient·feature / ‖b‖² over all channels of the token.
    """
    of_b = slope * (grad - (POWER * pull)[:, None] * (slope * b)) + pull[:, None] * b
    return tl.where(x > 0.0, of_b * inverse[None, :], 0.0), of_b * b


@triton.jit
def state_of(state, h, D: tl.constexpr, BD: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr):
    """State of one head as an operand, its next two rows, and the shifts: see `_state`."""
    d = tl.arange(0, BD)
    live = d < D
    state += h * (D + EXTRA) * D
    S = tl.load(state + d[:, None] * D + d[None, :], mask=live[:, None] & live[None, :], other=0.0)
    z = tl.load(state + D * D + d, mask=live, other=0.0)
    m = z
    if EXTRA == 4:
        m = tl.load(state + D * D + D + d, mask=live, other=0.0)
        S -= z[:, None] * m[None, :]
        z += tl.load(state + D * D + 2 * D + d, mask=live, other=0.0)
        m += tl.load(state + D * D + 3 * D + d, mask=live, other=0.0)
    return operand(S, PRECISION), z, m
