"""Groups of tokens that are parts of the image, each with as many latents: cut out of their maps, and put back.

Source: FIT: Far-reaching Interleaved Transformers, Chen & Li, 2023, arXiv:2305.12689, section 2.
Shapes: B = batch, N = H·W tokens or latents, C = channels, W = B·groups, T = tokens or latents of a group.
"""

from typing import NamedTuple

from torch import Tensor

from kernels import windows
from models.layers.grid import Grid


class Groups(NamedTuple):
    """The maps of a group: of its tokens, and of its latents."""

    tokens: Grid
    latents: Grid

    def split(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Tokens by group, (B·R, T, C)."""
        return windows.split(x_BNC, *grid[:2], self.tokens[:2])

    def merge(self, x_WTC: Tensor, grid: Grid) -> Tensor:
        """The inverse of `split`."""
        return windows.merge(x_WTC, *grid[:2], self.tokens[:2])

    def split_latents(self, z_BNC: Tensor, grid: Grid) -> Tensor:
        """Latents by group, of all those beside a map of tokens."""
        return windows.split(z_BNC, *self.of_latents(grid)[:2], self.latents[:2])

    def merge_latents(self, z_WTC: Tensor, grid: Grid) -> Tensor:
        """The inverse of `split_latents`."""
        return windows.merge(z_WTC, *self.of_latents(grid)[:2], self.latents[:2])

    def of_latents(self, grid: Grid) -> Grid:
        """The map of all latents beside that of the tokens."""
        sides = zip(grid[:2], self.tokens[:2], self.latents[:2], strict=True)
        return Grid(*(-(-side // tokens) * latents for side, tokens, latents in sides))
