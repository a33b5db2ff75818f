"""The Triton kernels, one module per operation, and how they are launched. Imported when a fused path first runs."""

from kernels.dispatch import INTERPRETED

if INTERPRETED:
    from kernels.device import interpreter

    interpreter.mend()
