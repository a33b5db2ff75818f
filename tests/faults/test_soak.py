"""A long run keeps its memory, its open files and its threads."""

import os
import time
from pathlib import Path
from statistics import median

import pytest

from tests.faults.programs import TINY, start

STEPS = 10_000


def sample(pid: int) -> tuple[float, int, int]:
    """Resident MiB, open files and threads of a process."""
    process = Path("/proc", str(pid))
    pages = int((process / "statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGESIZE") / 2**20,
        len(list((process / "fd").iterdir())),
        len(list((process / "task").iterdir())),
    )


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_thousand_steps_leave_nothing_behind(workers, tmp_path, record_property):
    program = start(
        tmp_path,
        *("run.name=long", *TINY, "data.batch_size=4", f"data.workers={workers}", "checkpoint.every_n_steps=250"),
        *("trainer.max_epochs=-1", f"trainer.max_steps={STEPS}", "trainer.check_val_every_n_epoch=10"),
    )
    program.wait_for("/s")
    samples = []
    while not program.ended:
        try:
            samples.append(sample(program.pid))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(1)
    assert program.wait(3600) == 0, program.text[-3000:]
    samples = samples[len(samples) // 5 : -2]  # what is loaded once is loaded by then
    memory, files, threads = zip(*samples, strict=True)
    early, late = memory[: len(memory) // 3], memory[-len(memory) // 3 :]
    growth = sum(late) / len(late) - sum(early) / len(early)
    said = (
        f"{early[0]:.0f} -> {late[-1]:.0f} MiB, {min(files)}-{max(files)} files, {min(threads)}-{max(threads)} threads"
    )
    print(said)
    record_property("soak", said)
    assert growth < 0.03 * early[0], said
    for counts in (files, threads):  # at most moments no checkpoint is being written, which takes one of each
        third = len(counts) // 3
        assert median(counts[-third:]) <= median(counts[:third]), said
