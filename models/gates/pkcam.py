"""PKCAM: channels are weighted by their means and by those of the stages before.

Source: PKCAM, Bakr et al., 2022, arXiv:2211.07521 (the first version: EMCA); and the authors' code,
github.com/eslambakr/EMCA. The first block of a stage is ECA. In the others
    local = σ(conv_k(g)),  global = σ(conv_k(relu(w·[g₁ … gₛ, g]))),  x ⊙ (1 + σ(u·[local, global]))
with g the mean over the map, gₛ the last one of an earlier stage, its channels repeated, and a weight per source; where
these are no divisor of the channels, the repetition is cut. The first block multiplies by 1 + local. Stages without
gates are no sources.
Prefix tokens are weighted as those of the map, whose means they do not enter.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.contract import Grid, Site
from models.gates import pooled
from models.gates.eca import channel_convolution
from models.layers.gated import Gate, Gated


class PKCAM(Gate):
    """Previous knowledge channel attention; it carries the last mean of each stage.

    Args:
        site: the place in the backbone.
        kernel_size: as in `models.gates.eca.ECA`, of both convolutions.
    """

    carries = True
    carries_across_stages = True

    def __init__(self, site: Site, kernel_size: int | Sequence[int] | None = None) -> None:
        super().__init__(site)
        self.local = channel_convolution(site, "pkcam", kernel_size)
        self.first = site.block == 0
        if not self.first:
            self.across = channel_convolution(site, "pkcam", kernel_size)
            sources = site.stage + 1
            # started as the authors' convolutions over the sources
            self.sources = nn.Parameter(torch.empty(sources).uniform_(-(sources**-0.5), sources**-0.5))
            self.fusion = nn.Parameter(torch.empty(2).uniform_(-(2**-0.5), 2**-0.5))

    def forward(self, x_BNC: Tensor, grid: Grid, carry: dict[int, Tensor] | None = None) -> Gated:
        mean_BC, earlier = pooled(x_BNC, grid), carry or {}
        weights_BC = self.convolved(self.local, mean_BC)
        if not self.first:
            knowledge_BC = F.relu(self.gathered(mean_BC, earlier))
            both_BC2 = torch.stack([weights_BC, self.convolved(self.across, knowledge_BC)], dim=2)
            weights_BC = (both_BC2 @ self.fusion).sigmoid()
        return Gated(x_BNC * (1 + weights_BC.unsqueeze(1)), {}, {**earlier, self.site.stage: mean_BC})

    def gathered(self, mean_BC: Tensor, earlier: dict[int, Tensor]) -> Tensor:
        """The weighted sum of the last means of earlier stages, and of the present one."""
        dim = mean_BC.shape[1]
        total = self.sources[-1] * mean_BC
        for stage in range(self.site.stage):
            if stage in earlier:
                times = -(-dim // earlier[stage].shape[1])
                total = total + self.sources[stage] * earlier[stage].repeat(1, times)[:, :dim]
        return total

    @staticmethod
    def convolved(conv: nn.Conv1d, x_BC: Tensor) -> Tensor:
        """σ(conv over the channels)."""
        return conv(x_BC.unsqueeze(1)).squeeze(1).sigmoid()
