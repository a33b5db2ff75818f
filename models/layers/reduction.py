"""Fewer keys and values: the map is shortened by a strided convolution, by pooling to a fixed size, or in its rows.

Every module is called as `(x_BNC, grid) -> (x_BSC, kv_grid)`; prefix tokens are not expected. `cells` says of which
tokens a new one is made, as shares along both axes: (rows of the shortened map, rows) and (its columns, columns).
Source: spatial reduction: PVT, Wang et al., ICCV 2021, arXiv:2102.12122; pooling: PVT v2 (linear SRA), Wang et al.,
CVMJ 2022, arXiv:2106.13797.
Shapes: B = batch, N = H·W tokens, S = tokens of the shortened map, C = channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from models.layers.norm import TokenBatchNorm
from models.layers.tokens import completed, to_map, to_tokens


class SpatialReduction(nn.Module):
    """s×s convolution with stride s, then LayerNorm: s² times fewer tokens.

    Maps that s does not divide are zero-padded at the bottom and right, so that every token is seen; the authors' code
    drops the rest there.

    Args:
        dim: channels C.
        ratio: side s of the squares that become one token.

    Raises:
        ValueError: a ratio below 1.
    """

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        if ratio < 1:
            raise UserError(f"SpatialReduction: ratio must be at least 1, got {ratio}; 1 keeps every token")
        self.ratio = ratio
        self.conv = nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def reduced(self, grid: tuple) -> tuple:
        """The map of keys and values for a map of queries; the same type as `grid`."""
        return grid._replace(height=-(-grid.height // self.ratio), width=-(-grid.width // self.ratio))

    def cells(self, grid: tuple) -> tuple[Tensor, Tensor]:
        """Squares, the last of them with what is left."""
        found = []
        for side in grid[:2]:
            square = torch.arange(side) // self.ratio
            within = (square == torch.arange(-(-side // self.ratio))[:, None]).float()
            found.append(within / within.sum(1, keepdim=True))
        return found[0], found[1]

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        x_BCHW = completed(to_map(x_BNC, grid), (0, -grid.width % self.ratio, 0, -grid.height % self.ratio))
        return self.norm(to_tokens(self.conv(x_BCHW))), self.reduced(grid)


class PooledReduction(nn.Module):
    """Average pooling to `size`×`size` tokens whatever the map, 1×1 convolution, LayerNorm, GELU.

    Maps smaller than `size` are repeated up to it, as in the authors' code.

    Args:
        dim: channels C.
        size: side of the pooled map.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, dim: int, size: int = 7) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"PooledReduction: size must be at least 1, got {size}; the paper uses 7")
        self.size = size
        self.conv = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def reduced(self, grid: tuple) -> tuple:
        """The map of keys and values for a map of queries; the same type as `grid`."""
        return grid._replace(height=self.size, width=self.size)

    def cells(self, grid: tuple) -> tuple[Tensor, Tensor]:
        """What adaptive pooling averages, see `averaged`."""
        return averaged(grid.height, self.size), averaged(grid.width, self.size)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        pooled = F.adaptive_avg_pool2d(to_map(x_BNC, grid), (self.size, self.size))
        return F.gelu(self.norm(to_tokens(self.conv(pooled)))), self.reduced(grid)


class RunReduction(nn.Module):
    """The mean of every ratio² tokens in a row, then batch norm: ratio² times fewer tokens.

    What is left at the end and makes no whole run is left out, as in the authors' code; fewer tokens than a run
    are one.
    Source: MedViT, Manzari et al., 2023, arXiv:2302.09462.

    Args:
        dim: channels C.
        ratio: square root of the tokens of a run.
    """

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.run, self.norm = ratio**2, TokenBatchNorm(dim)

    def reduced(self, grid: tuple) -> tuple:
        """The row of keys and values for a map of queries; the same type as `grid`."""
        return grid._replace(height=1, width=max(grid.height * grid.width // self.run, 1))

    def cells(self, grid: tuple) -> tuple[Tensor, Tensor]:
        """Runs of the map as one row."""
        count, size = self.reduced(grid).width, min(self.run, grid.height * grid.width)
        run = torch.arange(grid.height * grid.width) // size
        return torch.ones(1, 1), (run == torch.arange(count)[:, None]).float() / size

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        pooled_BCS = F.avg_pool1d(x_BNC.mT, min(self.run, x_BNC.shape[1]))
        return self.norm(pooled_BCS.mT), self.reduced(grid)


def averaged(side: int, pooled: int) -> Tensor:
    """(pooled, side): of each cell of a line pooled adaptively, which share every cell has."""
    return F.adaptive_avg_pool1d(torch.eye(side)[None], pooled)[0].T
