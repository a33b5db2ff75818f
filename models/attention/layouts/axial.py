"""Axes: tokens see those of their column, of their row, or of both in turn or summed.

Source: Axial Attention in Multidimensional Transformers, Ho et al., 2019, arXiv:1912.12180. Here queries, keys and
values of both axes come from one projection; `attention=axial` has one for each, as its authors.
"""

from conf import values
from models.attention.contract import Grid, Site
from models.attention.contract.layout import Layout
from models.attention.layouts.stripes import Directions
from models.attention.layouts.window import Windows

ALONG = ("columns", "rows", "both", "alternate")


def axial(site: Site, *, along: str = "both") -> Layout:
    """Attention along one axis of the map or both.

    Args:
        site: the place in the backbone.
        along: "columns" (up and down), "rows", "both" (the sum of the two) or "alternate": columns in even blocks, rows
            in odd ones.

    Raises:
        ValueError: an unknown axis.
    """
    values.choice("axial", "along", along, ALONG, fix="set attention.layout.along")
    if along == "both":
        return Directions(1, summed=True)
    return Axis(along == "columns" or (along == "alternate" and site.block % 2 == 0))


class Axis(Windows):
    """Windows one token wide, as long as the map."""

    def __init__(self, columns: bool) -> None:
        super().__init__(None)
        self.columns = columns

    def window_on(self, grid: Grid) -> tuple[int, int]:
        return (grid.height, 1) if self.columns else (1, grid.width)
