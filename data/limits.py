"""Limits of the machine that loader processes meet: shared memory, open files, memory."""

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.transforms import sides

if TYPE_CHECKING:
    from data.module import ImageData

SHARED = Path("/dev/shm")
AHEAD = 2  # batches that every process prepares
TENSORS, OWN, PIPES = 6, 200, 8  # open files: of a batch, of a process that trains, of every process that reads
MIB = 2**20


def limit_problems(data: "ImageData", workers: int, processes: int) -> list[str]:
    """What loader processes would run into: too little shared memory, too few open files.

    Args:
        workers: loader processes of a training process; those of validation are as many.
        processes: training processes of this machine.
    """
    if workers == 0:
        return []
    batch = data.batch_size * data.channels * int(np.prod(sides(data.crop_size))) * np.dtype(data.depth).itemsize
    needed = batch * AHEAD * workers * processes
    return _shared_memory(needed, batch, workers) + _open_files(workers)


def _shared_memory(needed: int, batch: int, workers: int) -> list[str]:
    free = _free_shared()
    if free is None or needed <= free:
        return []
    fits = max(0, workers * free // needed)
    return [
        f"data.workers: {workers} processes hand over batches of {_mib(batch)} in {SHARED}, {_mib(needed)} in all, "
        f"which has {_mib(free)} free; set data.workers={fits}, or give the container more (docker run --shm-size=8g)"
    ]


def _open_files(workers: int) -> list[str]:
    """Raises the soft limit where the hard one allows it; what is wrong where it does not."""
    needed = OWN + 2 * workers * (PIPES + AHEAD * TENSORS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return []
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return []
    fits = max(0, (hard - OWN) // (2 * (PIPES + AHEAD * TENSORS)))
    return [
        f"data.workers: {workers} processes need about {needed} open files, and the limit is {hard}; "
        f"set data.workers={fits}, or raise the limit (ulimit -n)"
    ]


def free() -> str:
    """ "64 MiB of /dev/shm and 2,048 MiB of memory are free"; what is known of that."""
    shared, memory = _free_shared(), _free_memory()
    found = ((SHARED, shared), ("memory", memory))
    known = [f"{_mib(count)} of {name}" for name, count in found if count is not None]
    return f"{' and '.join(known)} are free" if known else "no memory?"


def _free_shared() -> int | None:
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"
