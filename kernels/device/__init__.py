"""What kernels share, and how they are launched and interpreted. Imported when a fused path first runs."""

from kernels.dispatch import INTERPRETED

if INTERPRETED:
    from kernels.device import interpreter

    interpreter.mend()
