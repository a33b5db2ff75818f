"""Depth-wise convolution as a token mixer: every channel sees its neighbourhood with fixed learned weights.

Source: A ConvNet for the 2020s, Liu et al., CVPR 2022, arXiv:2201.03545, section 2.6 (7×7, ConvNeXt).
Shapes: B = batch, N = H·W tokens, C = channels, M = heads, D = channels per head.
"""

from torch import Tensor, nn

from models.attention import Accepts, Grid, Mixed, Site
from models.attention.multihead import head_channels
from models.layers.tokens import to_map, to_tokens


def conv(site: Site, *, kernel_size: int = 7) -> "DepthwiseConv":
    """A depth-wise convolution with zero padding; the map keeps its size.

    Args:
        site: the place in the backbone.
        kernel_size: side of the kernel in cells, odd.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"conv: kernel_size must be odd, got {kernel_size}; set attention.kernel_size to 3, 5 or 7")
    return DepthwiseConv(site, kernel_size)


class DepthwiseConv(nn.Module):
    """(B, N, C) → (B, N, C). Gates (B, N, M) weight the channels of each head.

    `prenorm` tells a ConvNeXt that this mixer works on tokens that are not normalised and carries a token's own value
    through the centre of its kernel, so that its block needs neither a norm nor a residual around the mixer.
    """

    accepts = Accepts(prefix="refused")
    prenorm = False

    def __init__(self, site: Site, kernel_size: int) -> None:
        super().__init__()
        self.num_heads = site.num_heads
        head_channels(site)
        self.proj = nn.Conv2d(site.dim, site.dim, kernel_size, padding=kernel_size // 2, groups=site.dim)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        o_BNC = to_tokens(self.proj(to_map(x_BNC, grid)))
        if gates_BNM is not None:
            o_BNC = (o_BNC.unflatten(2, (self.num_heads, -1)) * gates_BNM.unsqueeze(-1)).flatten(2)
        return Mixed(o_BNC, {})
