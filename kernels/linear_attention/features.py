"""Device functions of `kernels.linear_attention`: tokens and heads of a program, features, states, convolutions."""

import triton
import triton.language as tl


@triton.jit
def place_of_program(N, span, chunks, groups, per, M):
    """Image, share, first and past-the-last token, first and past-the-last head of this program."""
    work = tl.program_id(0)
    group = work % groups
    chunk = work // groups % chunks
    image = (work // groups // chunks).to(tl.int64)
    return image, chunk, chunk * span, tl.minimum(chunk * span + span, N), group * per, tl.minimum(group * per + per, M)


@triton.jit
def load(x, n, row, c, mask):
    return tl.load(x + n[:, None] * row + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """Rounded to the 11 bits that tensor cores look at in TF32; they would cut the others off. NaN stays NaN."""
    if PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x


@triton.jit
def inverse_of(scale, c, live):
    """1 / scale, and 0 for channels that are none: their features are 0."""
    return tl.where(live, 1.0 / tl.load(scale + c, mask=live, other=1.0).to(tl.float32), 0.0)


@triton.jit
def positive(x, inverse):
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
def focus(x, row, position, scale, stats, plane, start, stop, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
           POWER: tl.constexpr, POSITION: tl.constexpr):  # fmt: skip
    """Of every token 1 / max(b) and ‖b‖ / ‖(b / max(b))^p‖: f(b) is the product of (b / max(b))^p and the latter."""
    c = tl.arange(0, BC)
    live = c < C
    inverse = inverse_of(scale, c, live)
    for first in range(start, stop, BP):
        n = first + tl.arange(0, BP)
        inside = (n < stop)[:, None] & live[None, :]
        value = load(x, n, row, c, inside)
        if POSITION:
            value += load(position, n, C, c, inside)
        b = positive(value, inverse)
        shrink = 1.0 / tl.max(b, 1)
        u = b * shrink[:, None]
        w = _power(u, POWER)
        factor = tl.sqrt(tl.sum(u * u, 1) / tl.sum(w * w, 1)) / shrink
        tl.store(stats + n, shrink, mask=n < stop)
        tl.store(stats + plane + n, factor, mask=n < stop)
    tl.debug_barrier()


@triton.jit
def feature_of(x, inverse, stats, plane, n, there, FOCUSED: tl.constexpr, POWER: tl.constexpr):
    """The feature of one head; "focused" gives 0 for tokens that are none."""
    if FOCUSED:
        shrink = tl.load(stats + n, mask=there, other=0.0)
        factor = tl.load(stats + plane + n, mask=there, other=0.0)
        x = _power(positive(x, inverse) * shrink[:, None], POWER) * factor[:, None]
    return x


@triton.jit
def through_feature(grad, x, phi, b, pull, FOCUSED: tl.constexpr, POWER: tl.constexpr):
    """Gradient of x from that of its feature; for "focused" also of log b.

    pull is Σ grad·phi / ‖b‖² over all channels of the token.
    """
    log_b = grad
    if FOCUSED:
        log_b = POWER * phi * grad + pull[:, None] * (b * b - POWER * phi * phi)
        grad = tl.where(x > 0.0, log_b / (x + 1e-6), 0.0)
    return grad, log_b


@triton.jit
def state_of(state, h, D: tl.constexpr, BD: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr):
    """State of one head as an operand, its next two rows, and the shifts: see `_state`."""
    d = tl.arange(0, BD)
    live = d < D
    state += h * (D + EXTRA) * D
    S = load(state, d, D, d, live[:, None] & live[None, :])
    z = tl.load(state + D * D + d, mask=live, other=0.0)
    m = z
    if EXTRA == 4:
        m = tl.load(state + D * D + D + d, mask=live, other=0.0)
        S -= z[:, None] * m[None, :]
        z += tl.load(state + D * D + 2 * D + d, mask=live, other=0.0)
        m += tl.load(state + D * D + 3 * D + d, mask=live, other=0.0)
    return operand(S, PRECISION), z, m
