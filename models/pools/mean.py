"""The mean over the map, whatever stands in front of it.

Source: Lin et al., Network in Network, ICLR 2014, arXiv:1312.4400, section 3.2 (global average pooling).
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from torch import Tensor

from models.layers.grid import Grid
from models.layers.pooled import Pool, Pooled


class Mean(Pool):
    """(B, N, C) → (B, C); class tokens are left out.

    Args:
        dim: channels C.
        grid, num_classes: of the place; it depends on neither.
    """

    has_weights = False

    def __init__(self, dim: int, grid: Grid, num_classes: int) -> None:
        super().__init__(dim)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Pooled:
        return Pooled(x_BNC[:, grid.prefix :].mean(1), None, {})
