"""Focal modulation: a query is multiplied by what convolutions of growing reach and the mean of the map make of it.

Source: Focal Modulation Networks, Yang et al., NeurIPS 2022, arXiv:2203.11926, equations 2 to 7:
y = W (q ⊙ h(Σ_l g_l ⊙ c_l)) with c_l = GELU(dwconv_l(c_{l-1})), k_l = window + 2·l, and the mean of the last over the
map as one level more. Gates g are one per token and level, the same for all channels, without an activation. Biases
stand in f, h and W, none in the convolutions. The authors' code divides the sum by its levels in their FocalNet-L with
four (`normalize`), and has a norm behind the product in FocalNet-H (`post_norm`).
Shapes: B = batch, N = H·W tokens, C = channels, L = levels, M = heads.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.depthwise_conv import LARGEST, depthwise_conv
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site
from models.attention.contract.heads import gated_heads, head_channels
from models.attention.contract.options import check_flags, for_stage


class FocalModulation(Mixer):
    """(B, N, C) → (B, N, C). Gates (B, N, M) weight the channels of each head in front of the output projection.

    Args:
        site: the place in the backbone.
        focal_levels: L, one number or one per stage.
        focal_window: side of the kernel of the first level, odd, one number or one per stage; every further one is two
            cells larger.
        normalize: divide the sum of the levels by L + 1.
        post_norm: LayerNorm behind the product of query and modulator.
        backend: "auto", "triton" or "torch".
    """

    accepts = Accepts(prefix="refused")
    without_matrix = "its modulator multiplies channels and is no sum of tokens with weights"

    def __init__(
        self,
        site: Site,
        *,
        focal_levels: int | Sequence[int] = 2,
        focal_window: int | Sequence[int] = 3,
        normalize: bool = False,
        post_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        check_flags("focal", normalize=normalize, post_norm=post_norm)
        levels = for_stage("focal_levels", focal_levels, site)
        window = for_stage("focal_window", focal_window, site)
        values.whole("focal", "focal_levels", levels, fix="set attention.focal_levels to 2, 3 or 4")
        values.odd("focal", "focal_window", window, fix="set attention.focal_window to 3 or 5")
        super().__init__(site, backend)
        head_channels(site, even=True)
        dim, self.normalize = site.dim, normalize
        self.f = nn.Linear(dim, 2 * dim + levels + 1)
        sides = [window + 2 * level for level in range(levels)]
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False) for k in sides)
        self.h, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5) if post_norm else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        C, L = x_BNC.shape[-1], len(self.convs)
        q_BNC, context_BNC, levels_BNL = self.f(x_BNC).split([C, C, L + 1], dim=-1)
        modulator_BNC = 0
        for conv, gate_BN1 in zip(self.convs, levels_BNL.split(1, dim=-1), strict=False):  # the last one is below
            context_BNC = self._aggregated(context_BNC, conv, grid)
            modulator_BNC = modulator_BNC + gate_BN1 * context_BNC
        modulator_BNC = modulator_BNC + levels_BNL[..., L:] * F.gelu(context_BNC.mean(1, keepdim=True))
        if self.normalize:
            modulator_BNC = modulator_BNC / (L + 1)
        o_BNC = self.norm(q_BNC * self.h(modulator_BNC))
        return Mixed(self.proj(gated_heads(o_BNC, gates_BNM)), {})

    def _aggregated(self, context_BNC: Tensor, conv: nn.Conv2d, grid: Grid) -> Tensor:
        """GELU of the convolution; a kernel beyond those of the Triton operation is PyTorch's."""
        backend = self.backend if conv.kernel_size[0] <= LARGEST else "torch"
        return depthwise_conv(context_BNC, grid, conv.weight, gelu=True, backend=backend)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        if self.convs[-1].kernel_size[0] > LARGEST:
            return Runs("conv2d", False, f"the kernel goes up to {LARGEST}x{LARGEST} weights")
        return Runs("depthwise_conv", True)
