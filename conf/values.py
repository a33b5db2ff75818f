"""Checks of single values that a user may set, each with one wording.

Every function gives the value back, or raises `UserError`: "<who>: <name> must be <what>, got <value>; <fix>". `what`
replaces the usual words where an option may also be something else, e.g. "a positive number or all".
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from conf.errors import UserError


def is_whole(value: Any, at_least: int = 1) -> bool:
    """Whether it is a whole number from `at_least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: Any, at_least: float = -math.inf, at_most: float = math.inf) -> bool:
    """Whether it is a finite number between the two; True and False are none."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value) and at_least <= value <= at_most


def refuse(who: str, name: str, what: str, value: Any, fix: str) -> NoReturn:
    """The one form of these messages.

    Raises:
        UserError: always.
    """
    raise UserError(f"{who}: {name} must be {what}, got {value!r}; {fix}")


def whole(who: str, name: str, value: Any, at_least: int = 1, *, fix: str, what: str = "") -> int:
    """A whole number of at least so much."""
    if not is_whole(value, at_least):
        refuse(who, name, what or f"a whole number of at least {at_least}", value, fix)
    return value


def odd(who: str, name: str, value: Any, *, fix: str, or_none: bool = False, what: str = "odd and positive") -> int:
    """The side of a kernel that has a centre; with `or_none` 0 means that there is none."""
    if not (is_whole(value) and value % 2) and not (or_none and is_whole(value, 0) and value == 0):
        refuse(who, name, what, value, fix)
    return value


def number(who: str, name: str, value: Any, at_least: float = 0, *, fix: str, what: str = "") -> float:
    """A finite number of at least so much."""
    if not is_number(value, at_least):
        refuse(who, name, what or f"a number of at least {at_least}", value, fix)
    return value


def fraction(who: str, name: str, value: Any, *, fix: str, what: str = "") -> float:
    """A number between 0 and 1."""
    if not is_number(value, 0, 1):
        refuse(who, name, what or "a number between 0 and 1", value, fix)
    return value


def flag(who: str, name: str, value: Any, *, fix: str) -> bool:
    """True or False; a word such as "no" would count as true."""
    if not isinstance(value, bool):
        refuse(who, name, "true or false", value, fix)
    return value


def choice(who: str, name: str, value: Any, known: Iterable[str], *, fix: str) -> str:
    """One of a few words."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        refuse(who, name, " or ".join(known) if len(known) == 2 else f"one of {', '.join(known)}", value, fix)
    return value


def pair(who: str, name: str, value: Any, *, fix: str, what: str = "") -> tuple[int, int]:
    """Height and width, from one whole number of at least 1 or from two."""
    sides = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(sides) != 2 or not all(map(is_whole, sides)):
        refuse(who, name, what or "a whole number of at least 1, or two", value, fix)
    return sides
