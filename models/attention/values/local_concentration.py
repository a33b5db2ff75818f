"""Local concentration: two large depth-wise convolutions of the values beside the attention.

Source: The Linear Attention Resurrection in Vision Transformer, Zheng, 2025, arXiv:2501.16182, section 3.3 (LCM):
DW7 → GELU → BatchNorm → DW7. In L2ViT it is a branch of the block, after attention; here it works on the values.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head, C = M·D.
Prefix tokens get nothing. Values of a smaller map are enlarged bilinearly first. BatchNorm couples the images of a
batch in training.
"""

from torch import Tensor, nn

from conf import values
from kernels.heads import map_to_heads
from models.attention.contract import Grid, Site
from models.attention.contract.heads import head_channels, map_of


def local_concentration(site: Site, *, kernel_size: int = 7) -> "LocalConcentration":
    """Two convolutions with k × k weights for every channel.

    Args:
        site: the place in the backbone.
        kernel_size: k, odd. Paper: 7.

    Raises:
        ValueError: an even k.
    """
    values.odd("local_concentration", "kernel_size", kernel_size, fix="set attention.value.kernel_size, e.g. 7")
    return LocalConcentration(site.num_heads * head_channels(site), kernel_size)


class LocalConcentration(nn.Module):
    """What is added to the heads, (B, M, N, D)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim) for _ in range(2)
        )
        self.act, self.bn = nn.GELU(), nn.BatchNorm2d(dim)

    def forward(self, v_BMSD: Tensor, kv_grid: Grid, grid: Grid) -> Tensor:
        y_BCHW = self.bn(self.act(self.conv1(map_of(v_BMSD, kv_grid, grid))))
        return map_to_heads(self.conv2(y_BCHW), v_BMSD.shape[1], grid.prefix)
