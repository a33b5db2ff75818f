"""Position encodings: learned tables resized to any map, and a depth-wise convolution on the map.

Shapes: B = batch, N = tokens, C = channels, H W = map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from kernels.depthwise_conv import depthwise_conv
from kernels.layer_norm import WIDEST, conv_norm
from models.layers.resizable import Resizable
from models.layers.tokens import square_side, to_map, to_tokens


class LearnedPosition(Resizable, nn.Module):
    """Adds a learned vector per token; on another map size the table is resized.

    Args:
        dim: channels C.
        grid: height, width and prefix tokens that the table is made for.
        mode: "bicubic" with antialiasing, as timm's ViT does, or "bilinear" without, as the authors of PVT do for
            detection. A table from a file is resized in the same way (`resized`), so that a fine-tuned model starts as
            the function that its weights are at run time; most authors' loaders are bicubic without antialiasing.

    Raises:
        ValueError: another mode.
    """

    def __init__(self, dim: int, grid: tuple, mode: str = "bicubic") -> None:
        super().__init__()
        if mode not in ("bicubic", "bilinear"):
            raise UserError(f"LearnedPosition: mode is unknown, got {mode!r}; use bicubic or bilinear")
        self.mode = mode
        height, width, prefix = self.grid = tuple(grid)
        self.table = nn.Parameter(torch.empty(1, prefix + height * width, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        return x_BNC + self.on(grid)

    def on(self, grid: tuple) -> Tensor:
        """The table (1, N, C) of another map."""
        return self._fitted(self.table, self.grid, tuple(grid))

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A table (1, N', C) of another square map as the one of this module.

        Raises:
            ValueError: the other map is no square.
        """
        prefix = self.grid[2]
        side = square_side(value.shape[1] - prefix, "tokens")
        return self._fitted(value, (side, side, prefix), self.grid)

    def _fitted(self, table: Tensor, grid: tuple, new: tuple) -> Tensor:
        if grid == new:
            return table
        table_BCHW, antialias = to_map(table, grid), self.mode == "bicubic"
        resized = F.interpolate(table_BCHW, size=new[:2], mode=self.mode, antialias=antialias)
        return to_tokens(resized, table[:, : grid[2]])


class ConvPosition(nn.Module):
    """x + depth-wise convolution of the map; prefix tokens pass unchanged.

    Source: conditional position encoding, Chu et al., arXiv:2102.10882; used by DaViT and BiFormer with a 3×3 kernel.
    """

    def __init__(self, dim: int, kernel_size: int = 3, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.proj = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x_BNC: Tensor, grid: tuple) -> Tensor:
        return depthwise_conv(
            x_BNC, tuple(grid), self.proj.weight, self.proj.bias, residual=x_BNC, backend=self.backend
        )

    def with_norm(self, x_BNC: Tensor, grid: tuple, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The encoded tokens and their norm, on a GPU in one pass over memory."""
        if x_BNC.shape[-1] > WIDEST:
            x_BNC = self(x_BNC, grid)
            return x_BNC, norm(x_BNC)
        parameters = (self.proj.weight, self.proj.bias, norm.weight, norm.bias)
        return conv_norm(x_BNC, tuple(grid), *parameters, eps=norm.eps, backend=self.backend)
