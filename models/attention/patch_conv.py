"""The convolution of PatchConvNet: a depth-wise one between two products, and squeeze-and-excitation behind it.

Source: Augmenting Convolutional networks with attention-based aggregation, Touvron et al., 2021, arXiv:2112.13692,
section 3.1 and figure 2: W₂ SE(GELU(dwconv(GELU(W₁ x)))) with a 3×3 kernel and biases everywhere. The squeeze has a
quarter of the channels, with ReLU inside and a sigmoid behind it (SE-Net, arXiv:1709.01507). The authors' code takes
every map for a square; here any map runs.
Shapes: B = batch, N = H·W tokens, C = channels, M = heads.
"""

import torch.nn.functional as F
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from conf import values
from kernels.depthwise_conv import LARGEST, depthwise_conv
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site
from models.attention.contract.heads import gated_heads, head_channels
from models.layers.tokens import to_map, to_tokens


class PatchConv(Mixer):
    """(B, N, C) → (B, N, C). Gates (B, N, M) weight the channels of each head in front of the output projection.

    Args:
        site: the place in the backbone.
        kernel_size: side of the kernel, odd.
        squeeze: channels inside of the squeeze over C.
        backend: "auto", "triton" or "torch".

    Attributes:
        POINTWISE: names of the Linears that are 1×1 convolutions in the authors' code, which start as these do.
    """

    accepts = Accepts(prefix="refused")
    without_matrix = "it is a convolution, whose weights do not depend on what tokens hold"
    POINTWISE = ("proj_in", "proj")

    def __init__(self, site: Site, *, kernel_size: int = 3, squeeze: float = 0.25, backend: str = "auto") -> None:
        values.odd("patch_conv", "kernel_size", kernel_size, fix="set attention.kernel_size to 3, 5 or 7")
        if not (values.is_number(squeeze, 0, 1) and squeeze > 0):
            what = "a share of the channels above 0 and at most 1"
            values.refuse("patch_conv", "squeeze", what, squeeze, "set attention.squeeze to 0.25")
        super().__init__(site, backend)
        head_channels(site, even=True)
        dim = site.dim
        self.proj_in, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.se = SqueezeExcite(dim, rd_channels=max(round(squeeze * dim), 1))

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        backend = self.backend if self.runs().fused else "torch"
        u_BNC = F.gelu(self.proj_in(x_BNC))
        u_BNC = depthwise_conv(u_BNC, grid, self.conv.weight, self.conv.bias, gelu=True, backend=backend)
        u_BNC = to_tokens(self.se(to_map(u_BNC, grid)))
        return Mixed(self.proj(gated_heads(u_BNC, gates_BNM)), {})

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        if self.conv.kernel_size[0] > LARGEST:
            return Runs("conv2d", False, f"the kernel goes up to {LARGEST}x{LARGEST} weights")
        return Runs("depthwise_conv", True)
