"""Multi-window attention: every head has a window of its own, from a few tokens to the whole map.

Source: Masked Autoencoders with Multi-Window Local-Global Attention (MW-MAE), Yadav et al., ICLR 2024,
arXiv:2306.00561, section 3. Another list of windows in every block is that of multi-scale heads.
Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head.
Theirs is a sequence of spectrogram patches in its decoder; here windows are squares of the map, and maps that do not
divide are zero-padded before the projection. Heads with windows have a relative position bias, others have none.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby

from conf import values
from models.attention.contract import Mixer, Site
from models.attention.contract.options import check_flags
from models.attention.heads_apart import HeadsApart
from models.attention.softmax import softmax_attention

Windows = Sequence[int] | Sequence[Sequence[int]]


def multi_window_attention(
    site: Site,
    *,
    windows: Windows = (2, 4, 7, 0),
    shift: bool = False,
    relative_position_bias: bool = True,
    qkv_bias: bool = True,
    backend: str = "auto",
) -> Mixer:
    """Softmax attention in windows of several sizes, one per head.

    Args:
        site: the place in the backbone.
        windows: sides of the windows in tokens, cut to the map, 0 for the whole map; spread evenly over the heads, in
            order. A list of such lists has one for every block, in turn.
        shift: roll the windows of every second block by half a window.
        relative_position_bias: of every head with a window.
        qkv_bias: bias of the projection.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: sides that are none.
    """
    check_flags("multi_window", shift=shift, relative_position_bias=relative_position_bias, qkv_bias=qkv_bias)
    kinds = [(side, len(list(heads))) for side, heads in groupby(windows_of_heads(windows, site))]
    within = partial(softmax_attention, shift=shift, relative_position_bias=relative_position_bias, backend=backend)
    whole = partial(softmax_attention, backend=backend)
    parts = [(partial(within, window=side) if side else whole, heads) for side, heads in kinds]
    return HeadsApart(site, parts, qkv_bias=qkv_bias, backend=backend)


def windows_of_heads(windows: Windows, site: Site) -> list[int]:
    """The side of the window of every head."""
    fix = "give sides in tokens, 0 for the whole map, e.g. [2, 4, 7, 0]"
    if not isinstance(windows, Sequence) or isinstance(windows, str) or not windows:
        values.refuse("multi_window", "windows", "a list", windows, fix)
    listed = [side for side in windows if isinstance(side, Sequence) and not isinstance(side, str)]
    sides = windows[site.block % len(windows)] if len(listed) == len(windows) else windows
    for side in sides:
        values.whole("multi_window", "windows", side, 0, fix=fix)
    return [sides[(2 * head + 1) * len(sides) // (2 * site.num_heads)] for head in range(site.num_heads)]
