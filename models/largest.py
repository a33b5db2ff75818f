"""The largest batch that a memory holds, by doubling and then halving the gap."""

from collections.abc import Callable

CLOSE = 1.05  # found to 5 %


def largest(fits: Callable[[int], bool], known: int, most: int | None = None) -> int:
    """The largest number that fits, to 5 %, no larger than `most`.

    Args:
        fits: whether so many do; what it takes it must let go of.
        known: a number that fits.
        most: where looking ends; None for the first that does not fit.
    """
    too_many = None if most is None else most + 1
    while too_many is None or too_many > CLOSE * known + 1:
        tried = known * 2 if too_many is None or known * 2 < too_many else (known + too_many) // 2
        if fits(tried):
            known = tried
        else:
            too_many = tried
    return known
