"""Fewer keys and values: a coarser map of the same place, by a strided convolution or by pooling.

Source: spatial reduction: PVT, Wang et al., ICCV 2021, arXiv:2102.12122; pooling to a fixed side: PVT v2, Wang et al.,
CVMJ 2022, arXiv:2106.13797.
"""

from collections.abc import Sequence

from torch import nn

from models.attention.contract import Grid, Site
from models.attention.contract.layout import SHORTENED, Layout
from models.attention.contract.options import ratio_of
from models.layers.reduction import PooledReduction, SpatialReduction


def reduced(site: Site, *, ratio: int | Sequence[int] = (8, 4, 2, 1), pool: int | None = None) -> Layout:
    """Keys and values from a shortened map.

    Args:
        site: the place in the backbone.
        ratio: sides of the keys' map are this many times shorter: one number or one per stage; a plain ViT takes the
            third.
        pool: instead: the side of a pooled map, whatever the image; the ratio is then not used.

    Raises:
        ValueError: a number that is none.
    """
    chosen = ratio_of(site, 1 if pool is not None else ratio, pool)
    if pool is not None:
        return Reduced(PooledReduction(site.dim, pool))
    return Layout() if chosen == 1 else Reduced(SpatialReduction(site.dim, chosen))


class Reduced(Layout):
    """Keys and values from what `reduce` makes of the map."""

    keys = SHORTENED
    takes_prefix = False

    def __init__(self, reduce: nn.Module) -> None:
        self.reduce = reduce

    def kv_local(self, grid: Grid) -> Grid:
        return self.reduce.reduced(grid)
