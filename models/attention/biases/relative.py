"""Relative position bias: a learned number per head and offset.

Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, equation 4.
Shapes: M = heads, T = tokens of the map it is made for, N = queries, S = keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.contract import Grid, Site
from models.attention.contract.places import OfOffset, sampled
from models.layers.resizable import Resizable
from models.layers.tokens import square_side


def relative(site: Site) -> "RelativePositionBias":
    """One number per head and offset of the map, or window, that a core sees; on another map it is interpolated.

    Args:
        site: the place in the backbone, with the map that the core sees.
    """
    return RelativePositionBias(site.num_heads, tuple(site.grid[:2]))


class RelativePositionBias(Resizable, OfOffset):
    """One learned number per head and offset (dy, dx), query minus key; called without maps, it gives (M, T, T)."""

    def __init__(self, num_heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        height, width = self.window = window
        self.table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A table ((2h' - 1)(2w' - 1), M) of other square windows as the one of this module, bicubically.

        Raises:
            ValueError: the other windows are no squares.
        """
        side = square_side(value.shape[0], "offsets")
        table_1MHW = value.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        new = [2 * size - 1 for size in self.window]
        return F.interpolate(table_1MHW, size=new, mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)

    def forward(self, grid: Grid | None = None, kv_grid: Grid | None = None) -> Tensor:
        """(M, T, T) of its own map, or (M, N, S) of two others."""
        own = (grid is None or grid == Grid(*self.window)) and (kv_grid is None or kv_grid == Grid(*self.window))
        return self.table[self._rows()].permute(2, 0, 1).contiguous() if own else super().forward(grid, kv_grid)

    def _rows(self) -> Tensor:
        """(T, T): where the table has the offset of each pair; made anew, so that no device or file can spoil it."""
        height, width = self.window
        rows, columns = (torch.arange(side, device=self.table.device) for side in self.window)
        first_T = (rows[:, None] * (2 * width - 1) + columns).flatten()
        return first_T[:, None] - first_T + (height - 1) * (2 * width - 1) + width - 1

    def at(self, offsets: Tensor) -> Tensor:
        """(M, …), bilinearly between offsets, and the nearest one beyond its own map."""
        sides = [2 * side - 1 for side in self.window]
        return sampled(self.table.unflatten(0, sides).permute(2, 0, 1), offsets)
