"""What a reducer is and gives: fewer tokens go on to the blocks behind it.

Shapes: B = batch, N = prefix + H·W tokens, C = channels, K = tokens that are kept, besides the prefix.
"""

from typing import NamedTuple

from torch import Tensor, nn

from models.layers.grid import Grid


class Reduced(NamedTuple):
    """What a reducer returns."""

    x: Tensor  # (B, prefix + K, C), a row of tokens that make up no map any more
    kept: Tensor  # (B, K): which tokens behind the prefix these were
    losses: dict[str, Tensor]  # scalar auxiliary losses with gradient, by name


class Reducer(nn.Module):
    """Called as `reducer(x_BNC, grid, carry) -> Reduced` between blocks of a plain ViT, for any map.

    A factory is `reducer(dim, grid, quarter)`, asked for the places in front of quarters 1 to 3 of the blocks; it gives
    None where there is none.
    """

    def onward(self, reduced: Reduced, grid: Grid) -> Grid:
        """What stands for the map behind it: one row of the kept tokens, with the prefix as it was."""
        return Grid(1, reduced.kept.shape[1], grid.prefix)
