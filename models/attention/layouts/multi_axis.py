"""Windows in even blocks, dilated grids in odd ones: local and sparse global attention in turn.

Source: MaxViT, Tu et al., ECCV 2022, arXiv:2204.01697, section 3.2 and figure 3.
Shapes: as of `models.attention.layouts.window` and `models.attention.layouts.grid`.
"""

from collections.abc import Sequence

from models.attention.contract import Site
from models.attention.layouts.grid import grid
from models.attention.layouts.window import Windows, window


def multi_axis(site: Site, *, size: int | Sequence[int] = 7) -> Windows:
    """A window layout or a grid layout, by the number of the block.

    Args:
        site: the place in the backbone; `site.block` decides.
        size: side of windows and of grids in tokens, cut to the map. Paper: 7.
    """
    return grid(site, size=size) if site.block % 2 else window(site, size=size)
