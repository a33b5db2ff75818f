"""Locally-enhanced position encoding: a depth-wise convolution of the values beside the attention.

Source: CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652, equation 7.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head.
Prefix tokens get nothing. Values of a smaller map are enlarged bilinearly first.
"""

from torch import Tensor, nn

from conf import values
from kernels.heads import map_to_heads
from models.attention.contract import Grid, Site
from models.attention.contract.heads import head_channels, map_of


def lepe(site: Site, *, kernel_size: int = 3) -> "LePE":
    """k × k weights for every channel.

    Args:
        site: the place in the backbone.
        kernel_size: k, odd.

    Raises:
        ValueError: an even k.
    """
    values.odd("lepe", "kernel_size", kernel_size, fix="set attention.value.kernel_size, e.g. 3")
    return LePE(site.num_heads * head_channels(site), kernel_size)


class LePE(nn.Module):
    """What is added to the heads, (B, M, N, D)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, v_BMSD: Tensor, kv_grid: Grid, grid: Grid) -> Tensor:
        return map_to_heads(self.conv(map_of(v_BMSD, kv_grid, grid)), v_BMSD.shape[1], grid.prefix)
