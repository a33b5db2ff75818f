"""The floors of a launch: bytes over bandwidth, instructions over issue slots; and what is predicted from them.

Memory's floor is each argument once at the bandwidth that copying reaches; the floor of issue is every instruction that
the warps of all programs execute, four per clock and multiprocessor. The prediction is the larger of 1/0.85 of the one
and 1/0.65 of the other. Barriers, latency where few warps are there, and the half rate of integers are not in it.
"""

from functools import cache
from math import prod
from typing import NamedTuple

from kernels.evidence import trips
from kernels.evidence.assumed import assumed_length
from kernels.evidence.chips import BANDWIDTH_REACHED, ISSUE_REACHED, Chip
from kernels.evidence.code import Code, Loop, code_of
from kernels.evidence.steps import Recorded


class Floors(NamedTuple):
    """Of one launch, in seconds. `assumed`: whether a loop's length was assumed."""

    dram: float
    issue: float
    predicted: float
    instructions: float  # that a warp executes
    assumed: bool

    @property
    def share(self) -> float:
        """Of the bandwidth."""
        return self.dram / self.predicted if self.predicted else 0.0

    @property
    def cap(self) -> float:
        """The share of the bandwidth that full issue leaves room for."""
        return min(1.0, self.dram / self.issue) if self.issue else 1.0


def floors_of(launch: Recorded, chip: Chip) -> Floors:
    """What this chip needs at least, and what is predicted of it."""
    return floors_of_work(launch.bytes, *work_of(launch, chip.target), chip)


def floors_of_work(size: int, warps: int, instructions: float, is_assumed: bool, chip: Chip) -> Floors:
    """Of bytes, warps, and instructions of each."""
    dram, issue = size / chip.bandwidth, instructions * warps / chip.issued
    predicted = max(dram / BANDWIDTH_REACHED, issue / ISSUE_REACHED)
    return Floors(dram, issue, predicted, instructions, is_assumed)


@cache
def work_of(launch: Recorded, target: str) -> tuple[int, float, bool]:
    """Warps of all programs, instructions that each of them executes, and whether a length was assumed."""
    code = code_of(launch.launch, target)
    counted = trips.trips_of(code.ir, dict(launch.numbers), launch.grid, assumed_length(launch))
    instructions = executed(code, counted)
    return prod(launch.grid) * launch.launch.warps, instructions, bool(counted.unknown)


def executed(code: Code, counted: trips.Trips) -> float:
    """Instructions of a warp: those outside of loops as often as their line is reached, at most once; the loops' often.

    A line that the IR does not have (an address, worked out by the assembler) is reached always.
    """
    total = sum(n * min(1.0, counted.lines.get(where, 1.0)) for where, n in code.straight.items())
    return total + sum(loop.instructions * _turns(loop, code, counted) for loop in code.loops)


def _turns(loop: Loop, code: Code, counted: trips.Trips) -> float:
    """How often the machine runs a loop: of a loop in two parts, the larger takes all that is whole."""
    times = counted.loops.get(loop.where, 1.0)
    unrolled = max((o.unrolled for o in code.loops if o.where == loop.where), default=1)
    if loop.remainder:
        return times % unrolled
    return times // loop.unrolled if loop.unrolled > 1 else times
