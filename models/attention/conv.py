"""Depth-wise convolution as a token mixer: every channel sees its neighbourhood with fixed learned weights.

Source: A ConvNet for the 2020s, Liu et al., CVPR 2022, arXiv:2201.03545, section 2.6 (7×7, ConvNeXt).
Shapes: B = batch, N = H·W tokens, C = channels, M = heads, D = channels per head.
"""

from torch import Tensor, nn

from conf import values
from kernels.depthwise_conv import LARGEST, depthwise_conv
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site
from models.attention.contract.heads import gated_heads, head_channels


def conv(site: Site, *, kernel_size: int = 7, backend: str = "auto") -> Mixer:
    """A depth-wise convolution with zero padding; the map keeps its size.

    Args:
        site: the place in the backbone.
        kernel_size: side of the kernel in cells, odd.
        backend: "auto", "triton" or "torch".
    """
    values.odd("conv", "kernel_size", kernel_size, what="odd", fix="set attention.kernel_size to 3, 5 or 7")
    return DepthwiseConv(site, kernel_size, backend)


class DepthwiseConv(Mixer):
    """(B, N, C) → (B, N, C). Gates (B, N, M) weight the channels of each head.

    `prenorm` and `residual` tell a ConvNeXt that this mixer works on tokens that are not normalised and carries a
    token's own value through the centre of its kernel, so that its block needs neither a norm nor a residual around it.
    """

    accepts = Accepts(prefix="refused")
    prenorm = residual = False
    without_matrix = "it is a convolution, whose weights do not depend on what tokens hold"

    def __init__(self, site: Site, kernel_size: int, backend: str = "auto") -> None:
        super().__init__(site, backend)
        self.num_heads = site.num_heads
        head_channels(site, even=True)
        self.proj = nn.Conv2d(site.dim, site.dim, kernel_size, padding=kernel_size // 2, groups=site.dim)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        backend = self.backend if self.runs().fused else "torch"
        o_BNC = depthwise_conv(x_BNC, grid, self.proj.weight, self.proj.bias, backend=backend)
        return Mixed(gated_heads(o_BNC, gates_BNM), {})

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        if self.proj.kernel_size[0] > LARGEST:
            return Runs("conv2d", False, f"the kernel goes up to {LARGEST}x{LARGEST} weights")
        return Runs("depthwise_conv", True)
