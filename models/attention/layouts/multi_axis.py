"""Windows in even blocks, dilated grids in odd ones: local and sparse global attention in turn.

Source: MaxViT, Tu et al., ECCV 2022, arXiv:2204.01697, section 3.2 and figure 3.
The authors' windows and grids have the image's sides over 32, so that they fit the map of every stage: size "auto".
Shapes: as of `models.attention.layouts.window` and `models.attention.layouts.grid`.
"""

from collections.abc import Sequence

from conf import values
from models.attention.contract import Refused, Site
from models.attention.layouts.grid import grid
from models.attention.layouts.window import Windows, window

PIXELS = 32  # of an image to a token of a window or grid, along each side


def multi_axis(site: Site, *, size: int | str | Sequence[int] = 7) -> Windows:
    """A window layout or a grid layout, by the number of the block.

    Args:
        site: the place in the backbone; `site.block` decides.
        size: side of windows and of grids in tokens, or both sides, cut to the map; "auto": those of the image over 32,
            rounded down. Paper: 7 at 224 pixels, 12 at 384, 16 at 512.

    Raises:
        ValueError: a size that is none.
        Refused: "auto" in a backbone that is given no images.
    """
    if isinstance(size, str):
        values.choice("multi_axis", "size", size, ["auto"], fix="set attention.layout.size to tokens per side, or auto")
        if site.image_size is None:
            raise Refused("size=auto needs the image's size, which this backbone has not", "set attention.layout.size")
        size = [max(side // PIXELS, 1) for side in site.image_size]
    return grid(site, size=size) if site.block % 2 else window(site, size=size)
