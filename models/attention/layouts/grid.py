"""Dilated grids: tokens see those at the same place of every cell of the map, so that a group spans all of it.

Source: MaxViT, Tu et al., ECCV 2022, arXiv:2204.01697, section 3.2 (grid attention): windows with cell and window
exchanged. Maps that do not divide are zero-padded at the bottom and right before the projection, as windows are; the
authors' code stops there.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kernels.windows import padded
from models.attention.contract import Grid, Site
from models.attention.contract.options import window_of
from models.attention.layouts.window import Windows


def grid(site: Site, *, size: int | Sequence[int] = 7) -> "Dilated":
    """Groups of `size` × `size` tokens, spread evenly over the map.

    Args:
        site: the place in the backbone.
        size: tokens of a group per side, or both sides, cut to the map. Paper: 7.

    Raises:
        ValueError: a size that is none.
    """
    return Dilated(window_of(size, site.grid))


class Dilated(Windows):
    """Windows of the map whose rows and columns are dealt out to `size` cells."""

    def arrange(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        (h, w), (H, W) = self.window, self.arranged(grid)[:2]
        x = F.pad(x_BNC.unflatten(1, grid[:2]), (0, 0, 0, W - grid.width, 0, H - grid.height))
        dealt = x.unflatten(2, (w, W // w)).unflatten(1, (h, H // h)).transpose(1, 2).transpose(3, 4)
        return dealt.flatten(1, 4), Grid(H, W)

    def restore(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        (h, w), (H, W) = self.window, self.arranged(grid)[:2]
        dealt = x_BNC.unflatten(1, (H // h, h, W // w, w)).transpose(1, 2).transpose(3, 4)
        return dealt.flatten(3, 4).flatten(1, 2)[:, : grid.height, : grid.width].flatten(1, 2)

    def arranged(self, grid: Grid) -> Grid:
        return Grid(*(padded(side, size) for side, size in zip(grid[:2], self.window, strict=True)))
