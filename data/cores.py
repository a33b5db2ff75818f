"""The processor cores that this process may use, and how many of them others leave free."""

import math
import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(_own_cores())


def quota() -> float:
    """The processor time that the control group of this process is allowed, in cores; infinite without a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    group = next((line.partition("::")[2].strip("/") for line in lines if line.startswith("0::")), "")
    return quota_of(Path("/sys/fs/cgroup") / group)


def quota_of(group: Path) -> float:
    """The smallest limit of a control group and those around it."""
    limits = [math.inf]
    for folder in (group, *group.parents):
        try:
            most, period = (folder / "cpu.max").read_text().split()
            limits.append(float(most) / float(period))
        except (OSError, ValueError):  # "max", another version of control groups, or above their root
            continue
    return min(limits)


class _Times(NamedTuple):
    """Seconds since some moment: of the clock, of this process, and in which each core was idle."""

    clock: float
    own: float
    idle: dict[int, float]


@cache
def free_cores() -> float | None:
    """How many of the cores of this process others have left free since it began; None where it is not known.

    Asked once: later the runs of a sweep would take each other for other work.
    """
    now = _times()
    seconds = now.clock - _START.clock
    shared = now.idle.keys() & _START.idle.keys()
    if seconds < 0.2 or not shared:
        return None
    idle = sum(min(1.0, (now.idle[core] - _START.idle[core]) / seconds) for core in shared)
    return min(len(shared), idle + (now.own - _START.own) / seconds)


def _times() -> _Times:
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        lines, tick = [], 1
    return _Times(time.monotonic(), time.process_time(), idle_seconds(lines, _own_cores(), tick))


def idle_seconds(lines: Iterable[str], cores: Iterable[int], tick: int) -> dict[int, float]:
    """Of the lines of /proc/stat the idle time of these cores, waiting for disks included."""
    rows = (line.split() for line in lines)
    fields = {row[0]: row for row in rows if row and len(row) > 5}
    return {core: sum(map(int, fields[f"cpu{core}"][4:6])) / tick for core in cores if f"cpu{core}" in fields}


def _own_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


_START = _times()
