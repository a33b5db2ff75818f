"""Heads of a map cut into cells of one size, row by row; what the map lacks to whole cells is filled up by zeros.

Class tokens in front of the map make cells of their own, before the others.
Shapes: B = batch, M = heads, N = prefix + H·W tokens, D = channels per head; R = cells, T = places of one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.contract import Grid

Cell = tuple[int, int]


def cut(x_BMND: Tensor, grid: Grid, cell: Cell) -> Tensor:
    """(B, M, N, D) → (B, M, R, T, D)."""
    (height, width), places = cell, cell[0] * cell[1]
    first, map_BMND = x_BMND.split([grid.prefix, grid.cells], dim=2)
    map_BMHWD = map_BMND.unflatten(2, grid[:2])
    map_BMHWD = F.pad(map_BMHWD, (0, 0, 0, -grid.width % width, 0, -grid.height % height))
    map_BMYhXwD = map_BMHWD.unflatten(3, (-1, width)).unflatten(2, (-1, height))
    cells = map_BMYhXwD.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    if not grid.prefix:
        return cells
    return torch.cat([F.pad(first, (0, 0, 0, -grid.prefix % places)).unflatten(2, (-1, places)), cells], dim=2)


def join(x_BMRTD: Tensor, grid: Grid, cell: Cell) -> Tensor:
    """The inverse of `cut`, whatever stands in places without a token."""
    (height, width), ahead = cell, -(-grid.prefix // (cell[0] * cell[1]))
    first, cells = x_BMRTD.split([ahead, x_BMRTD.shape[2] - ahead], dim=2)
    map_BMYXhwD = cells.unflatten(3, cell).unflatten(2, (-(-grid.height // height), -(-grid.width // width)))
    map_BMHWD = map_BMYXhwD.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    map_BMND = map_BMHWD[:, :, : grid.height, : grid.width].flatten(2, 3)
    return torch.cat([first.flatten(2, 3)[:, :, : grid.prefix], map_BMND], dim=2) if grid.prefix else map_BMND


def held(grid: Grid, cell: Cell, device: torch.device) -> Tensor:
    """(R, T): which places hold a token."""
    return cut(torch.ones(1, 1, grid.tokens, 1, device=device), grid, cell)[0, 0, :, :, 0] > 0
