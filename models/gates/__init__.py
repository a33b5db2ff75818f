"""Gates: what weights the output of a mixer, an MLP or a block, per channel, per token, or both.

A factory `gate(site)` makes a `models.layers.gated.Gate`; `models.backbones.gating` puts one into every block with a
mixer.

Shapes: B = batch, N = prefix + H·W tokens, T = H·W tokens of the map, C = channels.
"""

import torch
from torch import Tensor

from models.layers.grid import Grid


def pooled(x_BNC: Tensor, grid: Grid) -> Tensor:
    """The mean over the map (B, C), without prefix tokens."""
    return x_BNC[:, grid.prefix :].mean(1)


def behind_prefix(x_BNC: Tensor, gated_BTC: Tensor, grid: Grid) -> Tensor:
    """The gated tokens of the map behind the prefix tokens of x, which pass."""
    return torch.cat([x_BNC[:, : grid.prefix], gated_BTC], dim=1) if grid.prefix else gated_BTC
