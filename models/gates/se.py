"""Squeeze-and-excitation: channels are weighted by a small MLP of their means.

Source: Squeeze-and-Excitation Networks, Hu et al., CVPR 2018, arXiv:1709.01507, equations 2 to 4.
Prefix tokens are weighted as those of the map, whose means they do not enter.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Site
from models.gates import pooled
from models.layers.gated import Gate, Gated


class SqueezeExcitation(Gate):
    """x ⊙ σ(W₂ relu(W₁ mean x)).

    Args:
        site: the place in the backbone.
        ratio: channels over hidden ones; at least one of these is left.
    """

    ignores_grid = True

    def __init__(self, site: Site, ratio: int = 16) -> None:
        super().__init__(site)
        values.whole("se", "ratio", ratio, fix="set gate.ratio")
        hidden = max(site.dim // ratio, 1)
        self.fc1, self.fc2 = nn.Linear(site.dim, hidden), nn.Linear(hidden, site.dim)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        weights_BC = self.fc2(F.relu(self.fc1(pooled(x_BNC, grid)))).sigmoid()
        return Gated(x_BNC * weights_BC.unsqueeze(1), {})
