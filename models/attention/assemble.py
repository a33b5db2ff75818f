"""A mechanism from its parts: the options that every multi-head mechanism takes besides its own."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from models.attention.contract import Accepts, Mixer, Refused, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import Layout
from models.attention.contract.options import check_flags, check_whole, ratio_of, stripe_of, window_of
from models.attention.cross_shaped import CrossShaped, MakeCore, MakePart
from models.attention.layouts.reduced import reduced
from models.attention.layouts.stripes import Directions
from models.attention.layouts.window import window as windows
from models.attention.multihead import MultiHead


class Composition(TypedDict, total=False):
    """Options of every multi-head mechanism.

    layout: factory of who may see whom, see `models.attention.layouts`; None for the whole map.
    window, shift, stored_mask: short for the layout `window`: side of the windows in tokens, cut to the map, and its
        other options.
    stripe: short for the layout `stripes`: width, one number or one per stage.
    sr_ratio, kv_pool: short for the layout `reduced`: keys and values from a map with sides this many times shorter,
        one number or one per stage, or pooled to this side.
    pre, transform, value: factories of parts, see `models.attention.multihead.MultiHead`.
    qkv_bias: bias of the projection.
    output_projection: whether the heads are projected.
    backend: "auto", "triton" or "torch".
    """

    layout: Callable[[Site], Layout] | None
    window: int | Sequence[int] | None
    shift: bool
    stored_mask: bool
    stripe: int | str | Sequence[int | str] | None
    sr_ratio: int | Sequence[int]
    kv_pool: int | None
    pre: MakePart | None
    transform: MakePart | None
    value: MakePart | None
    qkv_bias: bool
    output_projection: bool
    backend: str


def assemble(
    site: Site,
    core: MakeCore,
    *,
    layout: Callable[[Site], Layout] | None = None,
    window: int | Sequence[int] | None = None,
    stripe: int | str | Sequence[int | str] | None = None,
    sr_ratio: int | Sequence[int] = 1,
    kv_pool: int | None = None,
    pre: MakePart | None = None,
    transform: MakePart | None = None,
    value: MakePart | None = None,
    qkv_bias: bool = True,
    output_projection: bool = True,
    head_dim: int | None = None,
    accepts: Accepts | None = None,
    backend: str = "auto",
    shift: bool = False,
    stored_mask: bool = False,
) -> Mixer:
    """The mixer of a core in a layout, with its parts.

    Args:
        site: the place in the backbone.
        core: called with heads, the map of the queries and that of the keys, as a core sees them.
        layout, window, shift, stored_mask, stripe, sr_ratio, kv_pool, pre, transform, value, qkv_bias,
            output_projection, backend: see `Composition`.
        head_dim: channels per head D; None for what the site says.
        accepts: what it takes, where that is not what the layout takes.

    Raises:
        Refused: two layouts at once, a core that cannot work in the layout, stripes with an odd number of heads.
    """
    check_flags(
        "attention", qkv_bias=qkv_bias, output_projection=output_projection, shift=shift, stored_mask=stored_mask
    )
    check_whole("attention", head_dim=1 if head_dim is None else head_dim)
    dim = head_dim or head_channels(site)
    of_heads, rolled = site._replace(head_dim=dim), {"shift": shift, "stored_mask": stored_mask}
    chosen = _layout(of_heads, layout, window, stripe, sr_ratio, kv_pool, rolled)
    ends = {"qkv_bias": qkv_bias, "output_projection": output_projection}
    shared = {**ends, "backend": backend, "pre": pre and pre(site)}
    if isinstance(chosen, Directions):
        return CrossShaped(site, core, chosen, transform=transform, value=value, **shared)
    grid, kv_grid = chosen.local(site.grid), chosen.kv_local(site.grid)
    between = site._replace(grid=chosen.between(site.grid), head_dim=dim)
    parts: dict[str, Any] = {"transform": transform and transform(between), "value": value and value(between)}
    made = core(site.num_heads, grid, kv_grid)
    return MultiHead(site, made, layout=chosen, head_dim=dim, accepts=accepts, **parts, **shared)


def _layout(
    site: Site,
    layout: Callable[[Site], Layout] | None,
    window: int | Sequence[int] | None,
    stripe: int | str | Sequence[int | str] | None,
    sr_ratio: int | Sequence[int],
    kv_pool: int | None,
    of_windows: dict[str, bool],
) -> Layout:
    """What was chosen, by its own factory or by a short form."""
    size, width, ratio = window_of(window, site.grid), stripe_of(stripe, site), ratio_of(site, sr_ratio, kv_pool)
    shortened = ratio != 1 or kv_pool is not None
    short = [size is not None, width is not None, shortened]
    if sum(short) > 1:
        raise Refused(
            "window, stripe and shortened keys exclude each other", "set all but one of these options to null (or 1)"
        )
    if layout is not None:
        if any(short):
            raise Refused(
                "two layouts, attention/layout and a window, stripe or shortened keys",
                "leave out attention/layout, or set window, stripe and kv_pool to null and sr_ratio to 1",
            )
        return layout(site)
    if size is not None:
        chosen = windows(site, size=size, **of_windows)
        chosen.takes_prefix = False  # as Swin, whose windows these are, has none
        return chosen
    if width is not None:
        return Directions(width)
    return reduced(site, ratio=ratio, pool=kv_pool) if shortened else Layout()
