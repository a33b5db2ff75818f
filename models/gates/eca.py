"""ECA: every channel is weighted by the means of its neighbours among the channels.

Source: ECA-Net, Wang et al., CVPR 2020, arXiv:1910.03151: x ⊙ σ(conv1d_k(mean x)), one kernel of k weights without
bias, zeros beyond the ends; k = |log2(C)/2 + 1/2|, the odd number from there on, at least 3. The released networks do
not follow it: ECA-Net50 has kernels of 3, 5, 5 and 7 in its stages, ECA-Net18 of 3, 5, 7 and 7.
Prefix tokens are weighted as those of the map, whose means they do not enter.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Site
from models.attention.contract.options import for_stage
from models.gates import pooled
from models.layers.gated import Gate, Gated


class ECA(Gate):
    """Efficient channel attention.

    Args:
        site: the place in the backbone.
        kernel_size: channels that a weight depends on, odd, or a list with one per stage; None for the paper's formula.
    """

    ignores_grid = True

    def __init__(self, site: Site, kernel_size: int | Sequence[int] | None = None) -> None:
        super().__init__(site)
        self.conv = channel_convolution(site, "eca", kernel_size)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        weights_B1C = self.conv(pooled(x_BNC, grid).unsqueeze(1)).sigmoid()
        return Gated(x_BNC * weights_B1C, {})


def channel_convolution(site: Site, who: str, kernel_size: int | Sequence[int] | None, sources: int = 1) -> nn.Conv1d:
    """(B, sources, C) → (B, 1, C): the same few weights for the neighbours of each channel in every source."""
    kernel = kernel_of(site.dim) if kernel_size is None else for_stage("kernel_size", kernel_size, site, group="gate")
    values.odd(who, "kernel_size", kernel, fix="set gate.kernel_size, or null for the paper's formula")
    return nn.Conv1d(sources, 1, kernel, padding=kernel // 2, bias=False)


def kernel_of(dim: int) -> int:
    """The kernel for C channels: the paper's formula with γ = 2 and b = 1."""
    size = int(abs(math.log2(dim) + 1) / 2)
    return max(size if size % 2 else size + 1, 3)
