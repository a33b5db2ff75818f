"""Where one mechanism becomes faster than another as maps grow: between two sizes that decide it, on log-log lines."""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from kernels.bench.timing import Spread

Curve = Mapping[int, Spread]  # milliseconds by the side of the map


class Crossing(NamedTuple):
    """From this side of the map on `faster` takes less time; `milliseconds` where the two lines meet."""

    faster: str
    slower: str
    side: float
    milliseconds: float


def crossings(curves: Mapping[str, Curve]) -> list[Crossing]:
    """Of every pair, in the order in which they are given and met."""
    names = list(curves)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [crossing for a, b in pairs for crossing in _between(a, b, curves)]


def verdict(a: str, b: str, curves: Mapping[str, Curve]) -> str:
    """What there is to say of `a` beside `b`: "faster from 23x23 on", "slower at every size"."""
    decided = [first for _, first in _decided(a, b, curves)]
    if not decided:
        return "no difference beyond the spread" if curves[a].keys() & curves[b].keys() else "not compared"
    said = [
        f"{'faster' if c.faster == a else 'slower'} from {c.side:.0f}x{c.side:.0f} on" for c in _between(a, b, curves)
    ]
    return ", ".join(said) or f"{'faster' if decided[0] < 0 else 'slower'} at every size"


def _between(a: str, b: str, curves: Mapping[str, Curve]) -> Iterator[Crossing]:
    decided = list(_decided(a, b, curves))
    for (left, before), (right, after) in pairwise(decided):
        if before != after:
            side, milliseconds = _met(left, right, curves[a], curves[b])
            yield Crossing(*((a, b) if after < 0 else (b, a)), side, milliseconds)


def _decided(a: str, b: str, curves: Mapping[str, Curve]) -> Iterator[tuple[int, int]]:
    """Sides at which the spreads of the two do not overlap, with -1 where `a` is the faster one, else 1."""
    for side in sorted(curves[a].keys() & curves[b].keys()):
        first, second = curves[a][side], curves[b][side]
        if first.high < second.low or second.high < first.low:
            yield side, -1 if first.median < second.median else 1


def _met(left: int, right: int, a: Curve, b: Curve) -> tuple[float, float]:
    """Side and milliseconds at which the lines through the medians of both meet in log-log, for the last time."""
    gaps = {side: math.log(a[side].median / b[side].median) for side in sorted(a.keys() & b.keys())}
    inside = [side for side in gaps if left <= side <= right]
    left, right = [pair for pair in pairwise(inside) if (gaps[pair[0]] < 0) != (gaps[pair[1]] < 0)][-1]
    share = gaps[left] / (gaps[left] - gaps[right])

    def along(start: float, end: float) -> float:
        return math.exp((1 - share) * math.log(start) + share * math.log(end))

    return along(left, right), along(a[left].median, a[right].median)
