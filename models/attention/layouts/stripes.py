"""Cross-shaped windows: half of the heads in vertical stripes of the map, the other half in horizontal ones.

Source: CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652, section 3.2.
"""

from collections.abc import Sequence

from models.attention.contract import Grid, Site
from models.attention.contract.layout import Layout
from models.attention.contract.options import stripe_of


def stripes(site: Site, *, width: int | str | Sequence[int | str] = (1, 2, 7, "all")) -> Layout:
    """Stripes of `width` tokens in both directions.

    Args:
        site: the place in the backbone.
        width: of the stripes in tokens, one number or one per stage, cut to the map; "all" for the whole map. Paper: 1,
            2, 7, all. A plain ViT takes the third.

    Raises:
        ValueError: a width that is none.
    """
    chosen = stripe_of(width, site, "layout.width")
    return Layout() if chosen is None else Directions(chosen)


class Directions(Layout):
    """Windows of two directions that share the heads, or whose results are summed.

    Args:
        stripe: width of the stripes.
        summed: every head in both directions; else half of them in each.
    """

    takes_prefix = False

    def __init__(self, stripe: int, summed: bool = False) -> None:
        self.stripe, self.summed = stripe, summed

    def sizes(self, grid: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of a vertical and of a horizontal stripe."""
        height, width = grid[:2]
        return (height, min(self.stripe, width)), (min(self.stripe, height), width)
