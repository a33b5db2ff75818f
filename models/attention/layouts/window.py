"""Windows: tokens see those of their window; shifted in every second block.

Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, section 3.2. Maps are zero-padded at the bottom and
right to whole windows before the projection, and padded tokens take part, as in the authors' code.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, T = tokens in a window, W = B·windows, P = prefix tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import windows
from models.attention.contract import Grid, Site
from models.attention.contract.layout import Layout
from models.attention.contract.options import check_flags, window_of


def window(site: Site, *, size: int | Sequence[int] = 7, shift: bool = False, stored_mask: bool = False) -> "Windows":
    """Windows of `size` tokens.

    Args:
        site: the place in the backbone.
        size: side of the windows in tokens, or both, cut to the map. Papers: 7, 12 at 384 px.
        shift: roll the windows of every second block by half a window, masking pairs that were not neighbours.
        stored_mask: the masks of shifted windows are among the weights, as in the files of Swin.

    Raises:
        ValueError: a size that is none.
    """
    check_flags("layout", shift=shift, stored_mask=stored_mask)
    sides = window_of(size, site.grid)
    rolled = (0, 0)
    if shift and site.block % 2:
        # a window as large as the map has nothing to be shifted against
        rolled = tuple(w // 2 if w < side else 0 for w, side in zip(sides, site.grid[:2], strict=True))
    return Windows(sides, rolled, stored_mask)


class Windows(Layout):
    """Windows of fixed sides, rolled by `shift`.

    Class tokens stand in front of every window, and get the mean of what they get there.
    """

    def __init__(
        self, window: tuple[int, int] | None, shift: tuple[int, int] = (0, 0), stored_mask: bool = False
    ) -> None:
        self.window, self.shift, self.masks = window, shift, any(shift)
        self.stored_mask = stored_mask and any(shift)

    def local(self, grid: Grid) -> Grid:
        return Grid(*self.window_on(grid), grid.prefix)

    def split(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        if not grid.prefix:
            x, arranged = self.arrange(x_BNC, grid)
            return windows.split(x, arranged.height, arranged.width, self.window_on(grid), self.shift)
        x_WTC = self.split(x_BNC[:, grid.prefix :], grid._replace(prefix=0))
        prefix_WPC = x_BNC[:, : grid.prefix].repeat_interleave(self.count(grid), 0)
        return torch.cat([prefix_WPC, x_WTC], dim=1)

    def merge(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        if not grid.prefix:
            arranged = self.arranged(grid)
            merged = windows.merge(x_BNC, arranged.height, arranged.width, self.window_on(grid), self.shift)
            return self.restore(merged, grid)
        x_BNC, prefix_WPC = self.merge(x_BNC[:, grid.prefix :], grid._replace(prefix=0)), x_BNC[:, : grid.prefix]
        return torch.cat([prefix_WPC.unflatten(0, (-1, self.count(grid))).mean(1), x_BNC], dim=1)

    def count(self, grid: Grid) -> int:
        """Windows of a map."""
        rows, columns = (-(-side // size) for side, size in zip(grid[:2], self.window_on(grid), strict=True))
        return rows * columns

    def arranged(self, grid: Grid) -> Grid:
        """The size of what `arrange` gives."""
        return grid

    def mask(self, grid: Grid, device: Any) -> Tensor | None:
        mask = windows.shift_mask(grid.height, grid.width, self.window_on(grid), self.shift, device)
        return F.pad(mask, (grid.prefix, 0, grid.prefix, 0), value=True) if mask is not None and grid.prefix else mask
