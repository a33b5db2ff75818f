"""A depth-wise convolution of the values that all heads share, beside the attention.

Source: FLatten Transformer: Vision Transformer using Focused Linear Attention, Han et al., ICCV 2023, arXiv:2308.00442,
section 3.3, which restores the rank of its weights by it.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head.
Prefix tokens get nothing. Values of a smaller map are enlarged bilinearly first.
"""

from torch import Tensor, nn

from conf import values
from kernels.heads import map_to_heads
from models.attention.contract import Grid, Site
from models.attention.contract.heads import head_channels, map_of


def depthwise(site: Site, *, kernel_size: int = 5) -> "SharedDepthwise":
    """k × k weights for every channel of a head.

    Args:
        site: the place in the backbone.
        kernel_size: k, odd.

    Raises:
        ValueError: an even k.
    """
    values.odd("depthwise", "kernel_size", kernel_size, fix="set attention.value.kernel_size, e.g. 5")
    return SharedDepthwise(head_channels(site), kernel_size)


class SharedDepthwise(nn.Module):
    """What is added to the heads, (B, M, N, D)."""

    def __init__(self, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim)

    def forward(self, v_BMSD: Tensor, kv_grid: Grid, grid: Grid) -> Tensor:
        heads = v_BMSD.shape[1]
        v_BCHW = map_of(v_BMSD, kv_grid, grid)
        y = self.conv(v_BCHW.unflatten(1, (heads, -1)).flatten(0, 1)).unflatten(0, (-1, heads)).flatten(1, 2)
        return map_to_heads(y, heads, grid.prefix)
