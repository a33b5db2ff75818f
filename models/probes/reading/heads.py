"""Which heads of a layer are shown: each, their mean, or the one of a number."""

from collections.abc import Mapping
from typing import Any

from conf.errors import UserError
from conf.values import is_whole

HEADS = ("each", "mean")


def check_heads(heads: Any) -> None:
    """Refuses what names no heads."""
    if heads not in HEADS and not is_whole(heads, 0):
        raise UserError(f"probe: heads must be each, mean or the number of one, got {heads}; set probe.heads=each")


def check_head(heads: str | int, counts: Mapping[str, int]) -> None:
    """Refuses the number of a head that a layer has not.

    Args:
        heads: what `check_heads` lets pass.
        counts: heads of each layer by its name.
    """
    for name, count in counts.items():
        if is_whole(heads, 0) and heads >= count:
            raise UserError(f"probe: heads={heads} is none of the {count} heads of {name}; set probe.heads=mean")
