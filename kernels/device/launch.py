"""One way to launch a kernel, and the sizes that all of them need."""

import torch
import triton
from torch import Tensor

MULTIPROCESSORS = 132  # of the GPU that sizes are chosen for; others only get more or fewer rounds


def launch(
    kernel,
    grid: tuple[int, ...],
    *arguments,
    warps: int = 4,
    stages: int = 2,
    maxnreg: int | None = None,
    **constants,
) -> None:
    """Runs `kernel` on `grid` programs with positional arguments and constexpr keywords; nothing on an empty grid.

    Multiply-adds are fused explicitly: Triton 3.10 no longer does it by default.

    Args:
        kernel: Triton compiles it once for every combination of types, constants, and of what it knows of numbers:
            whether they are 1 or a multiple of 16. Numbers that change with the batch are `do_not_specialize` in it,
            or the last batch of an epoch would be compiled.
        grid: how many programs.
        arguments: tensors and numbers; a tensor at least.
        warps: of a program.
        stages: of loads that are under way in a loop.
        maxnreg: registers of a thread at most, where one less makes room for one more program.
        constants: constexpr parameters.
    """
    if 0 in grid:
        return
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
        kernel[grid](*arguments, **options, **constants)


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`; `tl.dot` needs 16."""
    return max(least, triton.next_power_of_2(n))


def precision(dtype: torch.dtype) -> str:
    """Of `tl.dot`: exact products for float32 unless PyTorch's matrix products may use TF32 as well.

    `fp32_precision` has what was set last, by itself, for all backends, or by the older `allow_tf32` and
    `set_float32_matmul_precision`, which cannot be read any more once it was set.
    """
    may_round = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype != torch.float32 or may_round else "ieee"


def turns(work: int, most: int) -> int:
    """Pieces of work for each program: few enough to leave 8 programs per multiprocessor of a large GPU."""
    return max(1, min(most, work // (8 * MULTIPROCESSORS)))


def partial_sums(like: Tensor, *shape: int) -> Tensor:
    """What programs add to a sum, each in its own place; summed in a fixed order afterwards."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def rows(x_BNC: Tensor) -> Tensor:
    """x with channels next to each other in memory, and an image within reach of 32-bit offsets; else a copy."""
    near = x_BNC.stride(-1) == 1 and (x_BNC.dim() < 2 or x_BNC.shape[-2] * x_BNC.stride(-2) < 2**31)
    return x_BNC if near else x_BNC.contiguous()
