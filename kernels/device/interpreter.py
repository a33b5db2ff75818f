"""Makes Triton's interpreter compute bfloat16 rightly, and accept a scalar condition in a mask.

It keeps bfloat16 as 16-bit integers, and multiplies those in `tl.dot`; and it cuts float32 off where hardware rounds to
the nearest. (Triton issue 11584: bfloat16 is not supported there yet.) Other arithmetic on bfloat16 stays wrong, so
kernels convert to float32 right after `tl.load` whatever is not an operand of `tl.dot`.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    """Replaces the conversions and the matrix product of the interpreter, once."""
    if getattr(InterpreterBuilder, "bfloat16_is_mended", False):
        return
    dot, cast, splat = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_splat

    def create_dot(self, a, b, d, *options):
        return dot(self, _widened(a), _widened(b), d, *options)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 != target:
            return cast(self, _widened(src), dst_type)
        if target == tl.bfloat16 != source:
            return TensorHandle(_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    def create_splat(self, ret_ty, arg):
        spread = splat(self, ret_ty, arg)
        return TensorHandle(spread.data.astype(bool), spread.dtype) if arg.data.dtype == np.bool_ else spread

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.create_splat = create_splat
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.bfloat16_is_mended = True


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
