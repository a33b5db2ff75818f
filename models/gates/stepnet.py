"""A reading of StepNet: channels are weighted by their means and by how these have changed since the block before.

Source: Understanding Self-attention Mechanism via Dynamical System Perspective, Huang et al., ICCV 2023,
arXiv:2308.09939: a residual branch is a step of an equation, its gate the size of the step, to be chosen by how stiff
the equation is, which the change from block to block tells. The paper's own formula is not at hand; here it is
    x ⊙ σ(conv_k([g, g − g′])),
ECA's convolution (`models.gates.eca`) over two rows, with g the mean over the map and g′ that of the block before. The
first block of a stage has none before it: no change, which is ECA.
Prefix tokens are weighted as those of the map, whose means they do not enter.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention.contract import Grid, Site
from models.gates import pooled
from models.gates.eca import channel_convolution
from models.layers.gated import Gate, Gated


class StepNet(Gate):
    """The size of a step, channel by channel; it carries the means, (B, C).

    Args:
        site: the place in the backbone.
        kernel_size: as in `models.gates.eca.ECA`.
    """

    carries = True
    ignores_grid = True

    def __init__(self, site: Site, kernel_size: int | Sequence[int] | None = None) -> None:
        super().__init__(site)
        self.conv = channel_convolution(site, "stepnet", kernel_size, sources=2)

    def forward(self, x_BNC: Tensor, grid: Grid, carry: Tensor | None = None) -> Gated:
        mean_BC = pooled(x_BNC, grid)
        change_BC = torch.zeros_like(mean_BC) if carry is None else mean_BC - carry
        weights_B1C = self.conv(torch.stack([mean_BC, change_BC], dim=1)).sigmoid()
        return Gated(x_BNC * weights_B1C, {}, mean_BC)
