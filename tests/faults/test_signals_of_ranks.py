"""Signals to one process of two, to both and to what started them: both stop at the same step, which is saved once."""

import os
import signal
import time
from pathlib import Path

import pytest

from models.checkpoints import read_manifest
from models.loggers.metrics_csv import read_metrics
from tests.faults.programs import ROOT, TINY, start

pytestmark = [pytest.mark.full, pytest.mark.case(9)]

LONG = ("run.name=a", *(a for a in TINY if "max_epochs" not in a), "trainer=ddp_cpu", "trainer.devices=2")
LONG = (*LONG, "trainer.max_epochs=10000", "trainer.check_val_every_n_epoch=1000")


def ranks(pid):
    """The processes that a program has started and that run train.py, by their order of starting."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (ProcessLookupError, FileNotFoundError):
            continue
        if parent == pid and any(word.endswith(b"train.py") for word in words):
            found.append(int(entry.name))
    return sorted(found)


def steps_begin(folder, timeout=240):
    """Until the first steps are in metrics.csv."""
    rows, end = folder / "outputs/a/metrics.csv", time.monotonic() + timeout
    while time.monotonic() < end and len(read_metrics(rows)) < 3:
        time.sleep(0.1)
    assert len(read_metrics(rows)) >= 3


def is_saved(folder):
    """The last step, which is the last that was logged."""
    step = read_manifest(folder / "outputs/a/checkpoints/last")["step"]
    assert int(float(read_metrics(folder / "outputs/a/metrics.csv")[-1]["step"])) == step - 1
    return step


@pytest.mark.parametrize("to", [pytest.param("the first", marks=pytest.mark.faults), "the second", "both"])
def test_two_processes_of_lightnings_launcher(tmp_path, to):
    program = start(tmp_path, *LONG)
    steps_begin(tmp_path)
    if to == "the second":
        os.kill(ranks(program.pid)[0], signal.SIGTERM)
    else:
        program.send(signal.SIGTERM, group=to == "both")
    assert program.wait(120) == 75, program.text
    assert program.text.count("stopped by SIGTERM at step") == 1 and "Traceback" not in program.text
    assert is_saved(tmp_path) > 0
    end = time.monotonic() + 60
    while ranks(program.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert ranks(program.pid) == []


TORCHRUN = """
import os, sys
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
os.execv(sys.executable, [*torchrun, {script!r}, *sys.argv[1:]])
"""


@pytest.mark.parametrize("to", [*(pytest.param(to, marks=pytest.mark.faults) for to in ("torchrun", "one")), "all"])
def test_two_processes_of_torchrun(tmp_path, to):
    """It makes every status 1."""
    program = start(tmp_path, *LONG, before=TORCHRUN.format(script=str(ROOT / "train.py")))
    steps_begin(tmp_path)
    if to == "one":
        os.kill(ranks(program.pid)[-1], signal.SIGUSR1)
    else:
        processes = [program.pid, *(ranks(program.pid) if to == "all" else [])]  # each is a group of its own
        for process in processes:
            os.kill(process, signal.SIGTERM)
    assert program.wait(120) != 0
    assert program.text.count("at step") == 1, program.text
    assert is_saved(tmp_path) > 0
