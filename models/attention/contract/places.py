"""Functions of how far a query lies behind a key: what biases and factors of positions have in common.

Shapes: M = heads, N = queries, S = keys, T = queries of a group; offsets are (…, 2), rows and columns, query minus key,
in cells of the map of the queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.contract import Grid
from models.layers.resizable import Resizable


def places(grid: Grid, like: Grid, device: torch.device | None) -> Tensor:
    """Where the cells of a map lie, (H·W, 2), in cells of the map `like` of the same extent; prefix tokens left out."""
    axes = []
    for side, of in zip(grid[:2], like[:2], strict=True):
        step = of / side
        axes.append(torch.arange(side, device=device, dtype=torch.float32) * step + (step - 1) / 2)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def offsets(grid: Grid, kv_grid: Grid, device: torch.device | None) -> Tensor:
    """(N, S, 2) of the cells of two maps of the same extent."""
    return places(grid, grid, device)[:, None] - places(kv_grid, grid, device)[None]


class OfOffset(nn.Module):
    """A number per head that depends on the offset of query and key alone; `neutral` where a prefix token takes part.

    A subclass defines `at(offsets) -> (M, …)`.
    """

    neutral = 0.0

    def at(self, offsets: Tensor) -> Tensor:
        """(M, …) for offsets (…, 2)."""
        raise TypeError(f"{type(self).__name__} defines no function of offsets")

    def forward(self, grid: Grid, kv_grid: Grid) -> Tensor:
        """(M, N, S) for a map of queries and one of keys, on the device of the parameters."""
        return self.on(grid, kv_grid, next((parameter.device for parameter in self.parameters()), None))

    def on(self, grid: Grid, kv_grid: Grid, device: torch.device | None) -> Tensor:
        """The same on a given device."""
        table_MNS = self.at(offsets(grid, kv_grid, device))
        if grid.prefix or kv_grid.prefix:
            table_MNS = F.pad(table_MNS, (kv_grid.prefix, 0, grid.prefix, 0), value=self.neutral)
        return table_MNS


def of_maps(part: nn.Module, grid: Grid, kv_grid: Grid, device: torch.device) -> Tensor:
    """What a part gives for two maps; one without parameters is told the device of the tokens."""
    fixed = isinstance(part, OfOffset) and next(part.parameters(), None) is None
    return part.on(grid, kv_grid, device) if fixed else part(grid, kv_grid)


class OffsetTable(Resizable, OfOffset):
    """A learned number per head and offset, key minus query: (M, 2H − 1, 2W − 1) for a map of H × W.

    Offsets between two are interpolated, and those beyond the map have the number of the nearest one.
    """

    def __init__(self, num_heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, *(2 * side - 1 for side in size)))

    def at(self, offsets: Tensor) -> Tensor:
        """(M, …); see `OfOffset`."""
        return sampled(self.table, -offsets)

    def resized(self, name: str, value: Tensor) -> Tensor:
        """The table of another map as the one of this module, bicubically."""
        return F.interpolate(value[None], size=self.table.shape[1:], mode="bicubic")[0]


def sampled(table_MHW: Tensor, offsets: Tensor) -> Tensor:
    """Numbers (M, …) of a table of offsets, whose middle is the offset 0, at offsets (…, 2): bilinearly, clamped."""
    half = torch.tensor([(side - 1) / 2 for side in table_MHW.shape[1:]], device=offsets.device)
    unit = offsets.float() / half.clamp_min(0.5)
    grid_1XY2 = unit.flip(-1).reshape(1, 1, -1, 2).to(table_MHW.dtype)
    found = F.grid_sample(table_MHW[None], grid_1XY2, padding_mode="border", align_corners=True)
    return found[0, :, 0].unflatten(1, offsets.shape[:-1])
