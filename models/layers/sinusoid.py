"""Sines and cosines of numbers: the fixed position table of a map, and the features of a timestep.

Source: Attention Is All You Need, Vaswani et al., 2017, arXiv:1706.03762, section 3.5; on maps as in MAE, He et al.,
CVPR 2022, arXiv:2111.06377, and DiT, Peebles & Xie, ICCV 2023, arXiv:2212.09748, whose columns come before the rows;
projected: the code of XCiT, El-Nouby et al., NeurIPS 2021, arXiv:2106.09681.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

import math

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.layers.resizable import Resizable


def frequencies(count: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """(count,): from 1 down towards 1/10000, geometrically."""
    return 10000.0 ** (-torch.arange(count, dtype=dtype, device=device) / count)


def timestep_features(timesteps_B: Tensor, dim: int) -> Tensor:
    """(B,) → (B, dim), cosines before sines, in float32; timesteps may be fractions."""
    angles_BF = timesteps_B.float()[:, None] * frequencies(dim // 2, torch.float32, timesteps_B.device)
    return torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1)


def position_table(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """(1, H·W, C) in float32: sines and cosines of the column in the first half of the channels, of the row after.

    Raises:
        ValueError: C is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(
            f"position_table: sines and cosines of rows and columns need a multiple of 4 channels, got {dim}; "
            "change model.dim"
        )
    omega = frequencies(dim // 4, torch.float64, device)
    rows, columns = (
        torch.arange(side, dtype=torch.float64, device=device)[:, None] * omega for side in (height, width)
    )
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=-1) for angles in (rows, columns))
    shape = (height, width, dim // 2)
    table_HWC = torch.cat([columns[None].expand(shape), rows[:, None].expand(shape)], dim=-1)
    return table_HWC.flatten(0, 1)[None].float()


class FixedPosition(Resizable, nn.Module):
    """Adds `position_table`: a parameter that is never trained, as in the files of MAE and DiT.

    A map of another size gets the table of that size.
    """

    def __init__(self, dim: int, grid: tuple) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.sinusoid = nn.Parameter(position_table(*self.grid[:2], dim), requires_grad=False)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        if tuple(grid) == self.grid:
            return x_BNC + self.sinusoid
        return x_BNC + position_table(*grid[:2], x_BNC.shape[2], x_BNC.device).to(self.sinusoid.dtype)

    def resized(self, name: str, value: Tensor) -> Tensor:
        """The table of this module in place of that of another map."""
        return position_table(*self.grid[:2], self.sinusoid.shape[2], value.device)


class ProjectedPosition(nn.Module):
    """Adds a Linear of sines and cosines of the place on the map, as a share of its sides, so that any map will do.

    Row and column, counted from 1, over the side and times 2π are the angles; sines and cosines take turns, and the
    rows come first.

    Args:
        dim: channels C.
        count: frequencies of each axis.
    """

    def __init__(self, dim: int, count: int = 16) -> None:
        super().__init__()
        self.count, self.proj = count, nn.Linear(4 * count, dim)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        rows, columns = (self._waves(side, x_BNC.device) for side in grid[:2])
        shape = (*grid[:2], 2 * self.count)
        waves_HWF = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=-1)
        return x_BNC + self.proj(waves_HWF.flatten(0, 1).to(self.proj.weight.dtype))

    def _waves(self, side: int, device: torch.device) -> Tensor:
        """(side, 2·count) in float32."""
        places = torch.arange(1, side + 1, dtype=torch.float32, device=device) / (side + 1e-6) * 2 * math.pi
        angles = places[:, None] * frequencies(self.count, torch.float32, device)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
