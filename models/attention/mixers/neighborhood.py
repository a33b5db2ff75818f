"""Neighbourhood attention: softmax attention of every token to those around it, with a relative position bias.

Source: Neighborhood Attention Transformer, Hassani et al., CVPR 2023, arXiv:2204.07143, equations 1 to 3; dilated:
DiNAT, arXiv:2209.15001; strided: Generalized Neighborhood Attention, arXiv:2504.16922, which has no bias.
Shapes: B = batch, N = H·W tokens, C = channels, K = kernel.
"""

from collections.abc import Sequence
from functools import partial
from typing import Unpack

from models.attention.biases.rpb import rpb
from models.attention.contract import Mixer, Refused, Site
from models.attention.contract.options import check_flags
from models.attention.layouts.neighborhood import neighborhood
from models.attention.softmax import SoftmaxParts, softmax_attention


def neighborhood_attention(
    site: Site,
    *,
    kernel: int | Sequence[int] = 7,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] | Sequence[Sequence[int]] = 1,
    pad: bool = True,
    relative_position_bias: bool = True,
    **parts: Unpack[SoftmaxParts],
) -> Mixer:
    """Softmax attention in the layout `neighborhood`, with the bias `rpb`.

    Args:
        site: the place in the backbone.
        kernel, stride, dilation, pad: see `models.attention.layouts.neighborhood.neighborhood`.
        relative_position_bias: the learned bias per head and offset.
        parts: parts, projection and backend, see `models.attention.softmax.SoftmaxParts`.

    Raises:
        Refused: another layout or bias, or a map that is too small without padding.
    """
    check_flags("neighborhood", relative_position_bias=relative_position_bias)
    if parts.get("layout") is not None:
        raise Refused("neighborhood attention is a layout by itself", "choose attention=softmax with attention/layout")
    layout = partial(neighborhood, kernel=kernel, stride=stride, dilation=dilation, pad=pad)
    if relative_position_bias and parts.get("bias") is not None:
        raise Refused("two biases, relative_position_bias and attention/bias", "set relative_position_bias=false")
    own = {"layout": layout} | ({"bias": rpb} if relative_position_bias else {})
    return softmax_attention(site, **parts | own)
