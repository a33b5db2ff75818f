"""Neighbourhoods: every token sees the `kernel`² tokens around it, dilated or not; strided ones share them in blocks.

Source: Neighborhood Attention Transformer, Hassani et al., CVPR 2023, arXiv:2204.07143; dilation: DiNAT, Hassani and
Shi, 2022, arXiv:2209.15001; stride: Generalized Neighborhood Attention, Hassani et al., 2025, arXiv:2504.16922. The
rule at borders is that of the authors' kernels (NATTEN): along each axis the window is moved inwards, so that every
token has exactly `kernel` keys, all in its residue class modulo the dilation. Even kernels lean to the left.
Shapes: B = batch, M = heads, N = H·W tokens of the padded map, D = channels per head, K = kernel; a group is one query
with its K² keys, so that 2·N·K²·C numbers are gathered where no kernel finds them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from kernels.neighborhood_attention.rule import keys_along
from models.attention.contract import Grid, Refused, Site
from models.attention.contract.layout import SURROUNDING, Around, Groups, Layout
from models.attention.contract.options import check_flags, for_stage

Pair = tuple[int, int]


def neighborhood(
    site: Site,
    *,
    kernel: int | Sequence[int] = 7,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] | Sequence[Sequence[int]] = 1,
    pad: bool = True,
) -> Layout:
    """The K² tokens around each token.

    Args:
        site: the place in the backbone.
        kernel: K, tokens of the neighbourhood per side, or both sides. Papers: 7.
        stride: tokens per side, or both sides, that share the neighbourhood of their middle one; at most the kernel,
            with which neighbourhoods are windows.
        dilation: distance of the keys: one number, a list that the blocks of a stage take in turn (e.g. [1, 8]), or a
            list of such lists with one per stage; a plain ViT takes the third.
        pad: maps smaller than kernel·dilation are completed with zeros at the bottom and right before the projection,
            so that what completes them is attended to (NAT's authors, NATTEN up to 0.15.1). False: they are refused.

    Raises:
        ValueError: a number that is none, or a stride above the kernel.
        Refused: without `pad`, a map that is smaller than kernel·dilation.
    """
    check_flags("neighborhood", pad=pad)
    sides, steps = (_pair(name, value) for name, value in (("kernel", kernel), ("stride", stride)))
    layout = Neighborhood(sides, steps, (dilation_of(dilation, site),) * 2, pad)
    layout.between(site.grid)
    return layout


def dilation_of(dilation: int | Sequence[int] | Sequence[Sequence[int]], site: Site) -> int:
    """The dilation of a block: see `neighborhood`."""
    fix = "give e.g. 2, [1, 8], or one such list per stage"
    if isinstance(dilation, Sequence) and any(isinstance(entry, Sequence) for entry in dilation):
        dilation = for_stage("dilation", dilation, site)
    pattern = [dilation] if isinstance(dilation, str) or not isinstance(dilation, Sequence) else list(dilation)
    for entry in pattern or [None]:
        values.whole("neighborhood", "dilation", entry, fix=fix)
    return pattern[site.block % len(pattern)]


def _pair(name: str, value: int | Sequence[int]) -> Pair:
    return values.pair("neighborhood", name, value, fix=f"set {name} to a number of tokens, or two")


class Neighborhood(Layout):
    """Every query has the keys of its neighbourhood.

    Args:
        kernel, stride, dilation: along both axes.
        pad: see `neighborhood`.
    """

    keys = SURROUNDING
    takes_prefix = False

    def __init__(self, kernel: Pair, stride: Pair = (1, 1), dilation: Pair = (1, 1), pad: bool = True) -> None:
        if any(step > side for step, side in zip(stride, kernel, strict=True)):
            raise UserError(
                f"neighborhood: stride must be at most the kernel {kernel}, got {stride}; with the same it is windows"
            )
        self.kernel, self.dilation, self.pad = kernel, dilation, pad
        self.around = Around(kernel, stride, dilation, keys_along)

    def local(self, grid: Grid) -> Grid:
        return Grid(1, 1)

    def kv_local(self, grid: Grid) -> Grid:
        return Grid(*self.kernel)

    def between(self, grid: Grid) -> Grid:
        """The map, completed where it is smaller than kernel·dilation.

        Raises:
            Refused: it is smaller, and there is no padding.
        """
        least = [k * d for k, d in zip(self.kernel, self.dilation, strict=True)]
        if not self.pad and (grid.height < least[0] or grid.width < least[1]):
            raise Refused(
                f"the neighborhood of {least[0]}x{least[1]} tokens, kernel·dilation, is larger than the map of "
                f"{grid.height}x{grid.width}",
                "set pad=true, or a smaller kernel or dilation",
            )
        return Grid(max(grid.height, least[0]), max(grid.width, least[1]))

    def split(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        height, width = self.between(grid)[:2]
        if (height, width) == grid[:2]:
            return x_BNC
        completed = (0, 0, 0, width - grid.width, 0, height - grid.height)
        return F.pad(x_BNC.unflatten(1, grid[:2]), completed).flatten(1, 2)

    def merge(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        between = self.between(grid)
        if between[:2] == grid[:2]:
            return x_BNC
        return x_BNC.unflatten(1, between[:2])[:, : grid.height, : grid.width].flatten(1, 2)

    def gather(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, kv_grid: Grid, content: nn.Module | None) -> Groups:
        B, M, N, D = q.shape
        rows, columns = axes = self.around.axes(grid, q.device)
        offsets = self.offsets(axes)
        alone = q.transpose(1, 2).reshape(B * N, M, 1, D)
        around = (gathered(t, grid, rows, columns) for t in (k, v))

        def back(o: Tensor) -> Tensor:
            return o.view(B, N, M, o.shape[-1]).transpose(1, 2)

        return Groups(alone, *around, Grid(1, 1), Grid(*self.kernel), {"offsets": offsets}, back, {})

    def offsets(self, axes: Sequence[Tensor]) -> Tensor:
        """How far each cell lies behind each of its keys, (N, 1, h·w, 2), for the cells that `Around.axes` gives."""
        y_HK, x_WK = (self._offsets(keys, i) for i, keys in enumerate(axes))
        away = torch.broadcast_tensors(y_HK[:, None, :, None], x_WK[None, :, None, :])
        return torch.stack(away, dim=-1).flatten(2, 3).flatten(0, 1)[:, None]

    def _offsets(self, keys: Tensor, axis: int) -> Tensor:
        """How far each cell lies behind its keys, counted within its residue class."""
        return (torch.arange(len(keys), device=keys.device)[:, None] - keys) / self.dilation[axis]


def gathered(t_BMND: Tensor, grid: Grid, rows: Tensor, columns: Tensor) -> Tensor:
    """The tokens of a map in the cells `rows` (H, h) and `columns` (W, w) of each cell: (B·N, M, h·w, D)."""
    cells = t_BMND.unflatten(2, grid[:2]).index_select(2, rows.flatten()).index_select(3, columns.flatten())
    cells_BMHhWwD = cells.unflatten(3, columns.shape).unflatten(2, rows.shape)
    return cells_BMHhWwD.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)
