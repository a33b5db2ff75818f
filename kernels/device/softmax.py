"""Softmax in base 2 over keys that come a tile at a time: logits are multiplied by log2(e) first."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def online_softmax(s, top, total, EMPTY: tl.constexpr):
    """Weights of the next keys, what shrinks all sums so far, and the new maximum and sum of weights of each row.

    Starts with a maximum of -inf and a sum of 0. EMPTY: a row may have only closed keys (logits of -inf) so far, where
    -inf - -inf would not be a number.
    """
    higher = tl.maximum(top, tl.max(s, 1))
    base = higher
    if EMPTY:
        base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    return p, shrink, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def scaled_softmax(s, scale, top, total):
    """`online_softmax` of `s · scale`, scale > 0: an instruction for each weight less. The maximum is one of s."""
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher * scale)
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top * scale - base)
    return p, shrink, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def row_products(a, b):
    """Σ a b of each row in float32; of an output and its gradient: what the softmax's derivative subtracts."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
