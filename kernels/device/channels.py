"""A head of D channels, held as A + R of them, both powers of two: 72 as 64 + 16 instead of 128."""

import triton
import triton.language as tl

from kernels.device.launch import power_of_2


@triton.jit
def load_channels(base, row, stride, keep, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Channels START to START + WIDTH of a head, zero beyond D and in rows that are not kept."""
    c = START + tl.arange(0, WIDTH)
    mask = keep[:, None] & (c < D)[None, :] if START + WIDTH > D else keep[:, None]
    return tl.load(base + row[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_channels(value, base, row, stride, keep, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """The counterpart of `load_channels`, in the dtype of the memory."""
    c = START + tl.arange(0, WIDTH)
    mask = keep[:, None] & (c < D)[None, :] if START + WIDTH > D else keep[:, None]
    tl.store(base + row[:, None] * stride + c[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_head(base, row, stride, keep, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr):
    """All channels of a head: a tuple of one part, or of two."""
    head = (load_channels(base, row, stride, keep, 0, A, D),)
    if R:
        head += (load_channels(base, row, stride, keep, A, R, D),)
    return head


@triton.jit
def store_head(head, scale, base, row, stride, keep, D: tl.constexpr, A: tl.constexpr, R: tl.constexpr):
    """The counterpart of `load_head`, each part times `scale`."""
    store_channels(head[0] * scale, base, row, stride, keep, 0, A, D)
    if R:
        store_channels(head[1] * scale, base, row, stride, keep, A, R, D)


@triton.jit
def no_head(ROWS: tl.constexpr, A: tl.constexpr, R: tl.constexpr):
    """Zeros, to which `added` adds."""
    head = (tl.zeros([ROWS, A], tl.float32),)
    if R:
        head += (tl.zeros([ROWS, R], tl.float32),)
    return head


@triton.jit
def products(x, y, R: tl.constexpr, PRECISION: tl.constexpr):
    """Of every row of x with every row of y."""
    s = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    if R:
        s = tl.dot(x[1], tl.trans(y[1]), s, input_precision=PRECISION)
    return s


@triton.jit
def added(total, weights, x, R: tl.constexpr, PRECISION: tl.constexpr):
    """What the rows of x are with these weights, on top of `total`."""
    head = (tl.dot(weights, x[0], total[0], input_precision=PRECISION),)
    if R:
        head += (tl.dot(weights, x[1], total[1], input_precision=PRECISION),)
    return head


def split(head_dim: int) -> tuple[int, int]:
    """D as A + R channels, powers of two of at least 16; R is 0 where it would not be fewer channels in all."""
    whole = power_of_2(head_dim)
    if head_dim in (whole, whole // 2) or head_dim < 32:
        return whole, 0
    rest = power_of_2(head_dim - whole // 2)
    return (whole, 0) if rest == whole // 2 else (whole // 2, rest)
