"""Local and global attention in turn: windows in even blocks, the whole map by a shortened one in odd blocks.

Source: Twins: Revisiting the Design of Spatial Attention in Vision Transformers, Chu et al., NeurIPS 2021,
arXiv:2104.13840, section 3.2 (LSA and GSA of Twins-SVT). Windows are neither shifted nor cut to the map, which is
zero-padded to whole ones; padded tokens take part, as in timm's code, also where the map is smaller than one.
Shapes: as of `models.attention.layouts.window` and `models.attention.layouts.reduced`.
"""

from collections.abc import Sequence

from conf import values
from models.attention.contract import Site
from models.attention.contract.layout import Layout
from models.attention.contract.options import ratio_of
from models.attention.layouts.reduced import reduced
from models.attention.layouts.window import Windows


def twins(site: Site, *, size: int | Sequence[int] = 7, ratio: int | Sequence[int] = (8, 4, 2, 1)) -> Layout:
    """A window layout or one of shortened keys, by the number of the block. Neither takes class tokens.

    Args:
        site: the place in the backbone; `site.block` decides.
        size: side of the windows in tokens, or both. Paper: 7.
        ratio: sides of the keys' map are this many times shorter: one number or one per stage; a plain ViT takes the
            third.

    Raises:
        ValueError: a number that is none.
    """
    sides = values.pair("twins", "size", size, fix="give the side of the windows in tokens, or two")
    ratio_of(site, ratio)
    chosen = reduced(site, ratio=ratio) if site.block % 2 else Windows(sides)
    chosen.takes_prefix = False
    return chosen
