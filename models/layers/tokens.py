"""Between token sequences and maps: (B, N, C) with N = prefix + H·W, and channels-last (B, C, H, W) views."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import UserError
from kernels.heads import to_map as to_map
from kernels.heads import to_tokens as to_tokens


def square_side(count: int, what: str) -> int:
    """The side of a square of `count` cells.

    Raises:
        ValueError: there is none.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(
            f"a table for {count} {what} is resized only from a square, got no square number; resize it first"
        )
    return side


def completed(x: Tensor, zeros: tuple[int, ...]) -> Tensor:
    """`F.pad`, which copies all of x where there is nothing to add; in graphs a size is not asked about."""
    return x if not torch.compiler.is_compiling() and not any(zeros) else F.pad(x, zeros)
