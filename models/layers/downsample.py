"""Between two stages: half the resolution, other channels. Odd maps are rounded up, so that no pixel is dropped.

Every module is called as `(x_BNC, grid) -> (x_BNC, grid)`; prefix tokens are not expected.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.tokens import completed, to_map, to_tokens


def reduced(grid: tuple, stride: int = 2) -> tuple:
    """The named tuple `grid` with height and width divided by `stride`, rounded up."""
    return grid._replace(height=-(-grid.height // stride), width=-(-grid.width // stride))


class PatchMerging(nn.Module):
    """2×2 neighbours side by side in the channels, LayerNorm, Linear without bias; zero padding of odd maps.

    Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, section 3.1. The order of the four neighbours is
    that of the authors' code: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        B, _, C = x_BNC.shape
        small = reduced(grid)
        x = completed(x_BNC.view(B, *grid[:2], C), (0, 0, 0, grid.width % 2, 0, grid.height % 2))
        x = (
            x.view(B, small.height, 2, small.width, 2, C)
            .permute(0, 1, 3, 4, 2, 5)
            .reshape(B, small.height * small.width, 4 * C)
        )
        return self.reduction(self.norm(x)), small


class ConvDownsample(nn.Module):
    """Norm, a convolution with stride 2, norm; zero padding of odd maps.

    ConvNeXt (arXiv:2201.03545) and DaViT (arXiv:2204.03645) have a LayerNorm in front of a 2×2 convolution, BiFormer
    (arXiv:2303.08810) a batch norm behind a 3×3 one.

    Args:
        dim, out_dim: channels before and after.
        kernel_size: side of the kernel; one larger than 2 overlaps, with (kernel_size - 1) // 2 zeros around the map.
        bias: of the convolution.
        norm, out_norm: modules on the tokens before and after the convolution, or None.
    """

    FOLDS = (("conv", "out_norm"),)  # see `models.layers.folded_norms`

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        kernel_size: int = 2,
        bias: bool = True,
        norm: nn.Module | None = None,
        out_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride=2, padding=(kernel_size - 1) // 2, bias=bias)
        self.out_norm = nn.Identity() if out_norm is None else out_norm

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        x_BCHW = completed(to_map(self.norm(x_BNC), grid), (0, grid.width % 2, 0, grid.height % 2))
        return self.out_norm(to_tokens(self.conv(x_BCHW))), reduced(grid)


def overlapping(dim: int, out_dim: int) -> ConvDownsample:
    """A 3×3 convolution and a LayerNorm behind it, as in PVT v2 (arXiv:2106.13797), CSWin and TransNeXt."""
    return ConvDownsample(dim, out_dim, kernel_size=3, out_norm=nn.LayerNorm(out_dim, eps=1e-5))


class PoolDownsample(nn.Module):
    """Max pooling over stride × stride cells, then Linear: the shortcut of CoAtNet's attention (arXiv:2106.04803)."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        x_BCHW = F.max_pool2d(to_map(x_BNC, grid), self.stride, ceil_mode=True)
        return self.proj(to_tokens(x_BCHW)), reduced(grid, self.stride)
