"""CBAM: channels are weighted by their means and maxima, then places by those over the channels.

Source: CBAM, Woo et al., ECCV 2018, arXiv:1807.06521, equations 1 to 3; the batch norm behind the convolution of places
is in the authors' code, not in the paper.
Prefix tokens are weighted per channel as those of the map, in whose means and maxima they do not enter; they have no
place.
Shapes: B = batch, N = prefix + H·W tokens, T = H·W, C = channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Site
from models.gates import behind_prefix
from models.layers.gated import Gate, Gated
from models.layers.tokens import to_map, to_tokens


class CBAM(Gate):
    """Convolutional block attention.

    Args:
        site: the place in the backbone.
        ratio: channels over hidden ones of the MLP; at least one of these is left.
        kernel_size: side of the convolution of places, odd.
    """

    def __init__(self, site: Site, ratio: int = 16, kernel_size: int = 7) -> None:
        super().__init__(site)
        values.whole("cbam", "ratio", ratio, fix="set gate.ratio")
        values.odd("cbam", "kernel_size", kernel_size, fix="set gate.kernel_size")
        hidden = max(site.dim // ratio, 1)
        self.fc1, self.fc2 = nn.Linear(site.dim, hidden, bias=False), nn.Linear(hidden, site.dim, bias=False)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        map_BTC = x_BNC[:, grid.prefix :]
        channels_BC = (self.excited(map_BTC.mean(1)) + self.excited(map_BTC.amax(1))).sigmoid()
        x = x_BNC * channels_BC.unsqueeze(1)
        map_BTC = x[:, grid.prefix :]
        found_BT2 = torch.stack([map_BTC.mean(2), map_BTC.amax(2)], dim=2)
        places_BT1 = to_tokens(self.norm(self.conv(to_map(found_BT2, grid[:2])))).sigmoid()
        return Gated(behind_prefix(x, map_BTC * places_BT1, grid), {})

    def excited(self, x_BC: Tensor) -> Tensor:
        """The MLP that means and maxima share."""
        return self.fc2(F.relu(self.fc1(x_BC)))
