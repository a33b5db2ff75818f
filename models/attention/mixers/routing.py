"""Routing attention: softmax attention in clusters around learned centroids, half of the heads local.

Source: Efficient Content-Based Sparse Attention with Routing Transformers, Roy et al., TACL 2021, arXiv:2003.05997.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from functools import partial
from typing import Unpack

from models.attention.contract import Mixer, Refused, Site
from models.attention.layouts.clusters.routing import routing
from models.attention.softmax import SoftmaxParts, softmax_attention


def routing_attention(
    site: Site,
    *,
    clusters: int = 8,
    members: int | None = None,
    cover: str = "local",
    shared_qk: bool = False,
    memory: int = 0,
    decay: float = 0.999,
    **parts: Unpack[SoftmaxParts],
) -> Mixer:
    """Softmax attention in the layout `clusters/routing`.

    Args:
        site: the place in the backbone.
        clusters, members, cover, shared_qk, memory, decay: see `models.attention.layouts.clusters.routing.routing`.
        parts: parts, projection and backend, see `models.attention.softmax.SoftmaxParts`.

    Raises:
        Refused: another layout.
    """
    if parts.get("layout") is not None:
        raise Refused("routing attention is a layout by itself", "choose attention=softmax with attention/layout")
    options = {"clusters": clusters, "members": members, "cover": cover, "shared_qk": shared_qk}
    layout = partial(routing, **options, memory=memory, decay=decay)
    return softmax_attention(site, **parts | {"layout": layout})
