"""Blocks with halos: the queries of a block see its keys and those around it, up to `halo` tokens away.

Source: HaloNet, Vaswani et al., CVPR 2021, arXiv:2103.12731, section 3 and figure 2. Beyond the map, keys and values
are zeros that take part (timm, and so its weights), or are masked (the code of lucidrains). Maps that do not divide
into blocks are completed in the same way; timm stops there.
Shapes: B = batch, M = heads, N = H·W tokens, D = channels per head; R = blocks of b × b queries with windows of w × w
keys, w = b + 2·halo; T = b², S = w².
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Site
from models.attention.contract.layout import SURROUNDING, Groups, Layout
from models.attention.contract.options import check_flags, window_of
from models.attention.contract.places import places
from models.layers.downsample import reduced


def halo(site: Site, *, block: int | Sequence[int] = 8, halo: int = 3, mask_padding: bool = False) -> "Halo":
    """Blocks of queries in larger windows of keys.

    Args:
        site: the place in the backbone.
        block: side of the blocks in tokens, or both sides, cut to the map. Paper: 8.
        halo: how many tokens beyond the block are seen on each side; 0 for windows. Paper: 3.
        mask_padding: zeros beyond the map are masked instead of attended to.

    Raises:
        ValueError: a number that is none.
    """
    check_flags("halo", mask_padding=mask_padding)
    values.whole("halo", "halo", halo, 0, fix="set halo to a number of tokens, or 0 for windows")
    values.pair("halo", "block", block, fix="set block to a number of tokens, or two")
    return Halo(window_of(block, site.grid), halo, mask_padding)


def strided(layout: "Halo", stride: int) -> "Halo":
    """With the queries of one of every `stride` rows and columns; as it is where these do not divide the blocks."""
    if any(side % stride for side in layout.block):
        return layout
    return Halo(layout.block, layout.halo, layout.masks, stride)


class Halo(Layout):
    """Blocks of fixed sides and their windows of keys.

    Args:
        block: sides of the blocks.
        halo: tokens around them.
        masks: whether what is beyond the map is masked.
        stride: of the queries: one of every so many rows and columns, whose blocks are so many times smaller.
    """

    keys = SURROUNDING
    takes_prefix = False

    def __init__(self, block: tuple[int, int], halo: int, masks: bool = False, stride: int = 1) -> None:
        self.block, self.halo, self.masks, self.stride = block, halo, masks, stride

    def local(self, grid: Grid) -> Grid:
        return reduced(Grid(*self.block), self.stride)

    def asking(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        s = self.stride
        return x_BNC if s == 1 else x_BNC.unflatten(1, grid[:2])[:, ::s, ::s].flatten(1, 2)

    def kv_local(self, grid: Grid) -> Grid:
        return Grid(*(side + 2 * self.halo for side in self.block))

    def between(self, grid: Grid) -> Grid:
        return grid

    def mask(self, grid: Grid, device: Any) -> Tensor:
        """(R, T, S), True for the keys of the map."""
        inside = torch.ones(1, grid.cells, 1, dtype=torch.bool, device=device)
        return self._windows(inside, grid).transpose(1, 2).expand(-1, self.local(grid).cells, -1)

    def gather(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, kv_grid: Grid, content: nn.Module | None) -> Groups:
        own, seen, sides = self.local(grid), self.kv_local(grid), reduced(grid, self.stride)[:2]
        M, (height, width), (b, c) = q.shape[1], self._blocks(grid), own[:2]
        blocks = F.pad(q.unflatten(2, sides), (0, 0, 0, width * c - sides[1], 0, height * b - sides[0]))
        blocks = blocks.unflatten(3, (width, c)).unflatten(2, (height, b)).permute(0, 2, 4, 1, 3, 5, 6)
        around = [self._windows(t.flatten(0, 1), grid).unflatten(0, (-1, M, height * width)) for t in (k, v)]
        asked = places(own, own, q.device) * self.stride
        offsets = asked[:, None] - (places(seen, seen, q.device) - self.halo)

        def back(o: Tensor) -> Tensor:
            map_BMHWD = o.view(-1, height, width, M, b, c, o.shape[-1]).permute(0, 3, 1, 4, 2, 5, 6)
            return map_BMHWD.flatten(4, 5).flatten(2, 3)[:, :, : sides[0], : sides[1]].flatten(2, 3)

        gathered = (t.transpose(1, 2).flatten(0, 1) for t in around)
        return Groups(blocks.flatten(4, 5).flatten(0, 2), *gathered, own, seen, {"offsets": offsets}, back, {})

    def _windows(self, x_BND: Tensor, grid: Grid) -> Tensor:
        """The tokens of a map, zeros around it, as (B·R, S, D)."""
        (b, c), h, (*_, right, _, bottom) = self.block, self.halo, self._completed(grid)
        x_BHWD = F.pad(x_BND.unflatten(1, grid[:2]), (0, 0, h, right + h, h, bottom + h))
        windows_BHWDhw = x_BHWD.unfold(1, b + 2 * h, b).unfold(2, c + 2 * h, c)
        return windows_BHWDhw.flatten(4).flatten(0, 2).mT

    def _blocks(self, grid: Grid) -> tuple[int, int]:
        """Blocks of a map along its sides."""
        return -(-grid.height // self.block[0]), -(-grid.width // self.block[1])

    def _completed(self, grid: Grid) -> tuple[int, ...]:
        """What `F.pad` completes a map (…, H, W, D) with to whole blocks."""
        return 0, 0, 0, -grid.width % self.block[1], 0, -grid.height % self.block[0]
