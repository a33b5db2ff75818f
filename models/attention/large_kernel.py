"""Large kernel attention: a token is multiplied by what a large kernel, taken apart into small ones, sees around it.

Source: Visual Attention Network, Guo et al., CVMJ 2023, arXiv:2202.09741, equations 2 to 4 and figure 3:
y = W₂ (u ⊙ g) with u = GELU(W₁ x) and g = W (dilated(conv(u))), two depth-wise convolutions, the second one dilated. A
kernel of K×K cells with dilation d takes one of 2d - 1 cells and a dilated one of ⌈K/d⌉: 5 and 7 for K = 21 and d = 3,
which see 23×23 cells. Biases stand everywhere, norms and sigmoids nowhere. As in the authors' code x is added to y
(`inner_shortcut`), beside the residual of the block; the paper has that one alone.
Shapes: B = batch, N = H·W tokens, C = channels, H W = map.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.depthwise_conv import LARGEST, depthwise_conv
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site
from models.attention.contract.options import check_flags
from models.layers.mbconv import init_convolutions
from models.layers.tokens import to_map, to_tokens


class LargeKernelAttention(Mixer):
    """(B, N, C) → (B, N, C), for any map.

    Args:
        site: the place in the backbone.
        dw_kernel: side of the first kernel, odd.
        dilated_kernel: side of the dilated kernel in its own steps, odd.
        dilation: cells from one of these steps to the next.
        inner_shortcut: add what goes in to what comes out.
        backend: "auto" or "torch"; there is no kernel for all of it.

    Attributes:
        POINTWISE: names of the Linears that are 1×1 convolutions in the authors' code, which start as these do.
    """

    accepts = Accepts(prefix="refused", gates=False, without_gates="it multiplies channels and has no heads")
    without_matrix = "it multiplies tokens by convolutions of themselves and is no sum of tokens with weights"
    POINTWISE = ("proj_in", "mix", "proj")

    def __init__(
        self,
        site: Site,
        *,
        dw_kernel: int = 5,
        dilated_kernel: int = 7,
        dilation: int = 3,
        inner_shortcut: bool = True,
        backend: str = "auto",
    ) -> None:
        values.odd("large_kernel", "dw_kernel", dw_kernel, fix="set attention.dw_kernel to 3, 5 or 7")
        values.odd("large_kernel", "dilated_kernel", dilated_kernel, fix="set attention.dilated_kernel to 5, 7 or 9")
        values.whole("large_kernel", "dilation", dilation, fix="set attention.dilation to 2 or 3")
        check_flags("large_kernel", inner_shortcut=inner_shortcut)
        super().__init__(site, backend)
        dim, self.inner_shortcut = site.dim, inner_shortcut
        reach = dilation * (dilated_kernel // 2)
        self.proj_in, self.mix, self.proj = (nn.Linear(dim, dim) for _ in range(3))
        self.conv = nn.Conv2d(dim, dim, dw_kernel, padding=dw_kernel // 2, groups=dim)
        self.dilated = nn.Conv2d(dim, dim, dilated_kernel, padding=reach, groups=dim, dilation=dilation)
        init_convolutions(self)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        u_BNC = F.gelu(self.proj_in(x_BNC))
        y_BNC = self.proj(self.weighted(u_BNC, grid))
        return Mixed(y_BNC + x_BNC if self.inner_shortcut else y_BNC, {})

    def weighted(self, u_BNC: Tensor, grid: Grid) -> Tensor:
        """u ⊙ g; a first kernel beyond those of the Triton operation is PyTorch's."""
        backend = self.backend if self.conv.kernel_size[0] <= LARGEST else "torch"
        near_BNC = depthwise_conv(u_BNC, grid, self.conv.weight, self.conv.bias, backend=backend)
        return u_BNC * self.mix(to_tokens(self.dilated(to_map(near_BNC, grid))))

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        return Runs("conv2d", False, "the kernel of depth-wise convolutions has no dilation")
