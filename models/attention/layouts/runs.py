"""Fewer keys and values: every one is the mean of a run of tokens that follow each other in raster order.

Source: the E-MHSA of MedViT, Manzari et al., Computers in Biology and Medicine 2023, arXiv:2302.09462, whose code pools
rows of tokens, not squares of the map as the paper's figures show.
"""

from collections.abc import Sequence

from models.attention.contract import Grid, Site
from models.attention.contract.layout import RUNS, Layout
from models.attention.contract.options import ratio_of
from models.layers.reduction import RunReduction


def runs(site: Site, *, ratio: int | Sequence[int] = (8, 4, 2, 1)) -> Layout:
    """Keys and values of ratio² tokens in a row.

    Args:
        site: the place in the backbone.
        ratio: one number or one per stage; a plain ViT takes the third.

    Raises:
        ValueError: a number that is none.
    """
    chosen = ratio_of(site, ratio)
    return Layout() if chosen == 1 else Runs(RunReduction(site.dim, chosen))


class Runs(Layout):
    """Keys and values from what `reduce` makes of the row of tokens; they have no places on the map."""

    keys = RUNS
    takes_prefix = False

    def __init__(self, reduce: RunReduction) -> None:
        self.reduce = reduce

    def kv_local(self, grid: Grid) -> Grid:
        return self.reduce.reduced(grid)
