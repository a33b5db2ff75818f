"""Bottleneck attention: softmax attention over the map with relative logits that depend on the query.

Source: Bottleneck Transformers for Visual Recognition, Srinivas et al., CVPR 2021, arXiv:2101.11605, section 3 and
figure 4; the relative logits are those of `models.attention.cores.halo`, of the whole map:
    o_i = Σ_j softmax_j((q_i k_j + q_i (r^h_{y_j − y_i} + r^w_{x_j − x_i})) / √D) v_j.
timm and its weights leave the relative logits unscaled (`scale_position: false`). Neither has a bias in the projection,
or an output projection: the next convolution of the block is one. Their tables belong to one size of the map; here they
are resized.
Shapes: D = channels per head, H W = map; the tables are (2H − 1, D) and (2W − 1, D).
"""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from models.attention.assemble import Composition, assemble
from models.attention.contract import Accepts, Grid, Mixer, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME
from models.attention.contract.options import check_flags
from models.attention.cores.halo import HaloCore, RelativeVectors
from models.layers.resizable import Resizable


def bottleneck_attention(site: Site, *, scale_position: bool = True, **composition: Unpack[Composition]) -> Mixer:
    """Dense attention with relative logits; class tokens are refused, since they have no position.

    Args:
        site: the place in the backbone.
        scale_position: the relative logits are scaled by D^-0.5 too, as in the paper.
        composition: layout, other parts, projections and backend, see `models.attention.assemble.Composition`.
    """
    check_flags("bottleneck", scale_position=scale_position)
    dim, accepts = head_channels(site), Accepts(prefix="refused")
    return assemble(site, lambda _, grid, __: BottleneckCore(dim, grid, scale_position), accepts=accepts, **composition)


class MapVectors(Resizable, RelativeVectors):
    """Vectors for the offsets of a map, interpolated for another one: the farthest offsets stay the farthest."""

    def forward(self, q_BMND: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        height, width = resized(self.height, kv_grid.height), resized(self.width, kv_grid.width)
        return self.logits(q_BMND, grid, kv_grid, height, width)

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A table (2H' − 1, D) of another map as the one of this module."""
        return resized(value, (len(getattr(self, name)) + 1) // 2)


class BottleneckCore(HaloCore):
    """The core of halo attention where the keys are the tokens of the map themselves."""

    keys = frozenset({SAME})
    places = False
    vectors = MapVectors


def resized(table: Tensor, side: int) -> Tensor:
    """(2·side − 1, D): a table of offsets along one axis, bicubically."""
    if len(table) == 2 * side - 1:
        return table
    columns = table.T[None, :, :, None]
    return F.interpolate(columns, size=(2 * side - 1, 1), mode="bicubic", align_corners=True)[0, :, :, 0].T
