"""Relative position bias of neighbourhood attention: a learned number per head and offset, key minus query.

Source: Neighborhood Attention Transformer, Hassani et al., CVPR 2023, arXiv:2204.07143, equation 2. It is the mirror
image of Swin's table, whose offsets are query minus key; offsets of dilated neighbourhoods are counted within the
residue class, as the layout gives them.
Shapes: M = heads, h w = kernel, or sides of the map that a core sees; the table is (M, 2h−1, 2w−1).
"""

from torch import nn

from models.attention.contract import Site
from models.attention.contract.places import OffsetTable


def rpb(site: Site) -> "NeighborBias":
    """One number per head and offset, key minus query, of the kernel or of the map that a core sees.

    Args:
        site: the place in the backbone, with that map.
    """
    return NeighborBias(site.num_heads, tuple(site.grid[:2]))


class NeighborBias(OffsetTable):
    """A table whose entry (i, j) is for the offset (i − h + 1, j − w + 1); NAT's authors resize it bicubically too."""

    def __init__(self, num_heads: int, kernel: tuple[int, int]) -> None:
        super().__init__(num_heads, kernel)
        nn.init.trunc_normal_(self.table, std=0.02)
