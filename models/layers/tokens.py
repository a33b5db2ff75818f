"""Between token sequences and maps: (B, N, C) with N = prefix + H·W, and channels-last (B, C, H, W) views."""

import math

import torch
from torch import Tensor

from conf.errors import UserError


def to_map(x_BNC: Tensor, grid: tuple) -> Tensor:
    """The map tokens as a (B, C, H, W) view in channels_last memory; prefix tokens are left out. No copy."""
    height, width, prefix = grid
    return x_BNC[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_tokens(x_BCHW: Tensor, prefix_BPC: Tensor | None = None) -> Tensor:
    """(B, C, H, W) → (B, N, C), after the prefix tokens when they are given."""
    x_BNC = x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
    return x_BNC if prefix_BPC is None or not prefix_BPC.shape[1] else torch.cat([prefix_BPC, x_BNC], dim=1)


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
