"""What options of mechanisms have in common: values per stage, sizes of kernels, windows, stripes and shortened keys.

Everything is read and checked before a module is made.
"""

from collections.abc import Sequence
from typing import Any

from conf import values
from conf.errors import UserError
from models.attention.contract import Grid, Refused, Site

STAGE_OF_VIT = 2  # see `for_stage`


def for_stage(name: str, value: Any, site: Site, group: str = "attention") -> Any:
    """An option that is one value, or a list with one per stage; a plain ViT takes the third.

    Its patches are of 16 pixels, as the tokens of a third stage are.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    stage = STAGE_OF_VIT if site.kind == "vit" else site.stage
    if stage >= len(value):
        raise Refused(
            f"{name}={list(value)} has no entry for stage {stage}",
            f"set {group}.{name} to one value, or one per stage",
        )
    return value[stage]


def check_whole(who: str, **options: Any) -> None:
    """Refuses options that are no whole numbers of at least 1."""
    for name, value in options.items():
        values.whole(who, name, value, fix=f"set attention.{name}")


def check_odd(who: str, **options: Any) -> None:
    """Refuses sides of kernels that are not odd."""
    for name, value in options.items():
        values.odd(who, name, value, fix=f"set attention.{name}")


def check_flags(who: str, **options: Any) -> None:
    """Refuses options that are neither true nor false."""
    for name, value in options.items():
        values.flag(who, name, value, fix=f"set attention.{name}=true or false")


def ratio_of(site: Site, sr_ratio: int | Sequence[int] = 1, kv_pool: int | None = None) -> int:
    """How many times shorter the sides of the map of the keys are at this place; 1 where they are pooled to `kv_pool`.

    Raises:
        ValueError: a number that is none, or both at once.
    """
    ratio = for_stage("sr_ratio", sr_ratio, site)
    check_whole("attention", sr_ratio=ratio, kv_pool=1 if kv_pool is None else kv_pool)
    if kv_pool is not None and ratio != 1:
        raise UserError(
            f"attention: sr_ratio and kv_pool both shorten the keys, got {ratio} and {kv_pool}; "
            "set sr_ratio=1 or kv_pool=null"
        )
    return ratio


def window_of(window: int | Sequence[int] | None, grid: Grid) -> tuple[int, int] | None:
    """The window as (height, width), no larger than the map it is built for; None stays None (the whole map)."""
    if window is None:
        return None
    what, fix = "a side of at least 1, or two", "give a number of tokens, two, or null for no windows"
    height, width = values.pair("attention", "window", window, what=what, fix=fix)
    return min(height, grid.height), min(width, grid.width)


def stripe_of(stripe: int | str | Sequence[int | str] | None, site: Site, name: str = "stripe") -> int | None:
    """The width of the stripes at this place; None for the whole map."""
    width = for_stage(name, stripe, site)
    if width is None or width == "all":
        return None
    what = "tokens, a whole number of at least 1"
    return values.whole("attention", name, width, what=what, fix="use e.g. 7, or all")
