"""Gaussian adaptive attention: features are weighted by how likely they are under learned Gaussians.

Source: Gaussian Adaptive Attention is All You Need, Ioannides et al., 2024, arXiv:2401.11143; and the authors' code,
github.com/gioannides/Gaussian-Adaptive-Attention. In every head, a chunk of the channels of a token,
    w = Π_g exp(-(x - μ - δ_g)² / (2 c_g² σ²)) / √(2π c_g²), normalised to sum one;  x ⊙ w
with μ and σ² of the chunk. So the mean weight is one over the size of the chunk, which shrinks the tokens, to 0.04 at
64 channels in 4 heads; `scale="size"` multiplies by that size. The authors' code divides by 10⁻⁸ at the least, which
fades out a head where all its features are unlikely; `scale="released"` does so, in logarithms.
Prefix tokens are weighted too: every token is by itself.
Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head, G = Gaussians.
"""

import math

import torch
from torch import Tensor, nn

from conf import values
from kernels.precision import wide
from models.attention.contract import Grid, Refused, Site
from models.layers.gated import Gate, Gated

SCALES = ("size", "released")


class GaussianAdaptive(Gate):
    """Every head weights its channels of a token.

    Args:
        site: the place in the backbone.
        heads: chunks of the channels, M.
        gaussians: per head, G.
        scale: "size" for a mean weight of one, or "released" for weights that sum to one.
    """

    ignores_grid = True
    undecayed = ("offset", "width")

    def __init__(self, site: Site, heads: int = 4, gaussians: int = 4, scale: str = "size") -> None:
        super().__init__(site)
        for name, value in (("heads", heads), ("gaussians", gaussians)):
            values.whole("gaussian", name, value, fix=f"set gate.{name}")
        self.scale = values.choice("gaussian", "scale", scale, SCALES, fix="set gate.scale")
        if site.dim % heads or site.dim < 2 * heads:
            raise Refused(
                f"gaussian: {site.dim} channels make no {heads} heads of at least 2 channels", "set gate.heads"
            )
        self.offset = nn.Parameter(torch.zeros(heads, gaussians))  # δ
        self.width = nn.Parameter(torch.randn(heads, gaussians).exp())  # c

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        x_BNMD = x_BNC.unflatten(2, (len(self.offset), -1))
        densities = self.log_densities(wide(x_BNMD))  # the square of a small variance is none in half precision
        if self.scale == "size":
            weights = densities.softmax(3) * x_BNMD.shape[3]
        else:
            weights = (densities - densities.logsumexp(3, keepdim=True).clamp(min=math.log(1e-8))).exp()
        return Gated((x_BNMD * weights.to(x_BNMD.dtype)).flatten(2), {})

    def log_densities(self, x_BNMD: Tensor) -> Tensor:
        """Of every feature in the product of the Gaussians, which is one: with the sum of their precisions."""
        var_BNM1, mean_BNM1 = torch.var_mean(x_BNMD, dim=3, keepdim=True)
        precisions_MG = self.width.square().reciprocal()
        precision_M1 = precisions_MG.sum(1, keepdim=True)
        centre_M1 = (precisions_MG * self.offset).sum(1, keepdim=True) / precision_M1
        apart_M1 = (precisions_MG * (self.offset - centre_M1).square()).sum(1, keepdim=True)
        away_BNMD = precision_M1 * (x_BNMD - mean_BNM1 - centre_M1).square() + apart_M1
        logs_M1 = (precisions_MG / (2 * math.pi)).log().sum(1, keepdim=True)
        return 0.5 * (logs_M1 - away_BNMD / (var_BNM1 + 1e-8))
