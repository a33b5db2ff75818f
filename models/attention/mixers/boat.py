"""Content attention of BOAT: softmax attention in clusters of similar queries, and a convolution of the values.

Source: BOAT: Bilateral Local Attention Vision Transformer, Yu et al., BMVC 2022, arXiv:2201.13027, section 3.2. Its
blocks have it behind window attention; its CSWin scales the logits by 1 instead of D^-0.5, by a slip.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from functools import partial
from typing import Unpack

from models.attention.contract import Mixer, Refused, Site
from models.attention.contract.options import check_flags
from models.attention.layouts.clusters.boat import boat
from models.attention.softmax import SoftmaxParts, softmax_attention
from models.attention.values.lepe import lepe as convolved


def boat_attention(
    site: Site, *, cluster: int = 49, overlap: int = 20, lepe: bool = True, **parts: Unpack[SoftmaxParts]
) -> Mixer:
    """Softmax attention in the layout `clusters/boat`, with a 3×3 depth-wise convolution of the values on the map.

    Args:
        site: the place in the backbone.
        cluster, overlap: see `models.attention.layouts.clusters.boat.boat`.
        lepe: the convolution.
        parts: parts, projection and backend, see `models.attention.softmax.SoftmaxParts`.

    Raises:
        Refused: another layout or value, or a map of one token.
    """
    check_flags("boat", lepe=lepe)
    if parts.get("layout") is not None:
        raise Refused("boat attention is a layout by itself", "choose attention=softmax with attention/layout")
    if lepe and parts.get("value") is not None:
        raise Refused("two values, lepe and attention/value", "set attention.lepe=false")
    own = {"value": convolved} if lepe else {}
    return softmax_attention(site, **parts | own | {"layout": partial(boat, cluster=cluster, overlap=overlap)})
