"""ULSAM: in every group of channels one map of weights over the places, which sum to one, is added to the tokens.

Source: ULSAM, Saini et al., WACV 2020, arXiv:2006.15102; and the authors' code,
github.com/Nandan91/ULSAM. With a summing to one over H·W places, x + a·x changes a token by about 1 / (H·W) of it.
Prefix tokens pass.
Shapes: B = batch, N = prefix + H·W tokens, T = H·W, C = channels, G = groups.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Refused, Site
from models.gates import behind_prefix
from models.layers.gated import Gate, Gated
from models.layers.tokens import to_map, to_tokens


class ULSAM(Gate):
    """x + a ⊙ x, a = softmax over places of relu(BN(point-wise(max-pooled relu(BN(depth-wise x))))), in every group.

    The depth-wise convolution is 1×1: a weight and a bias per channel. The modules of all groups are one of each.

    Args:
        site: the place in the backbone.
        groups: of channels, G.
    """

    def __init__(self, site: Site, groups: int = 4) -> None:
        super().__init__(site)
        values.whole("ulsam", "groups", groups, fix="set gate.groups")
        if site.dim % groups:
            raise Refused(f"ulsam: {site.dim} channels are no multiple of {groups} groups", "set gate.groups")
        self.depthwise = nn.Conv2d(site.dim, site.dim, 1, groups=site.dim)
        self.norm1 = nn.BatchNorm2d(site.dim, momentum=0.9)
        self.pointwise = nn.Conv2d(site.dim, groups, 1, groups=groups)
        self.norm2 = nn.BatchNorm2d(groups, momentum=0.9)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Gated:
        x_BTC = x_BNC[:, grid.prefix :]
        weights_BTG = self.weights(x_BTC, grid)
        added = (x_BTC.unflatten(2, (weights_BTG.shape[2], -1)) * weights_BTG.unsqueeze(3)).flatten(2)
        return Gated(behind_prefix(x_BNC, x_BTC + added, grid), {})

    def weights(self, x_BTC: Tensor, grid: Grid) -> Tensor:
        """(B, T, G); those of a group sum to one over the map."""
        x = F.relu(self.norm1(self.depthwise(to_map(x_BTC, grid[:2]))))
        x_BGHW = F.relu(self.norm2(self.pointwise(F.max_pool2d(x, 3, stride=1, padding=1))))
        return to_tokens(x_BGHW).softmax(1)
