"""Tiles of token maps: rows are tokens anywhere in memory, columns are channels next to each other."""

import triton
import triton.language as tl


@triton.jit
def load_tile(base, token, row, c, keep, live):
    """Channels c of tokens, `row` apart in memory; 0 in tokens that are not kept and channels that are not live."""
    return tl.load(base + token[:, None] * row + c[None, :], mask=keep[:, None] & live[None, :], other=0.0)


@triton.jit
def store_tile(base, token, row, c, keep, live, value):
    """The counterpart of `load_tile`, in the dtype of the memory."""
    to = base + token[:, None] * row + c[None, :]
    tl.store(to, value.to(base.dtype.element_ty), mask=keep[:, None] & live[None, :])


@triton.jit
def load_rows(base, token, row, keep, D: tl.constexpr, BD: tl.constexpr):
    """The D channels of a head, which starts at `base`, in BD columns."""
    d = tl.arange(0, BD)
    return load_tile(base, token, row, d, keep, d < D)


@triton.jit
def store_rows(base, token, row, keep, value, D: tl.constexpr, BD: tl.constexpr):
    """The counterpart of `load_rows`."""
    d = tl.arange(0, BD)
    store_tile(base, token, row, d, keep, d < D, value)
