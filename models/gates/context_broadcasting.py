"""Context broadcasting: the mean over the tokens is added to each of them.

Source: Scratching Visual Transformer's Back with Uniform Attention, Hyeon-Woo et al., ICCV 2023, arXiv:2210.08457:
(x + mean x) / 2 at the end of the MLP, which is half of the identity and half of a uniform attention (CB); and with a
scale per channel, x + Λ mean x (CB_S). There is no code of the authors; that Λ starts at zero is ours.
Prefix tokens enter the mean, and get it.
Shapes: B = batch, N = tokens, C = channels.
"""

import torch
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Site
from models.layers.gated import Gate, Gated


class ContextBroadcasting(Gate):
    """(x + mean x) / 2, or x + Λ mean x.

    Args:
        site: the place in the backbone.
        scaled: with the learned Λ.
    """

    at = "mlp"
    ignores_grid = True

    def __init__(self, site: Site, scaled: bool = False) -> None:
        super().__init__(site)
        values.flag("context_broadcasting", "scaled", scaled, fix="set gate.scaled=true or false")
        self.weight = nn.Parameter(torch.zeros(site.dim)) if scaled else None

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        mean_B1C = x_BNC.mean(1, keepdim=True)
        x = (x_BNC + mean_B1C) / 2 if self.weight is None else x_BNC + self.weight * mean_B1C
        return Gated(x, {})
