"""Runs whose output nobody reads, and whose files beside the checkpoints cannot be written for a while."""

import json
from pathlib import Path

import pytest

from models.loggers.metrics_csv import read_metrics
from models.runs import record
from tests.faults.programs import TINY, run

SHORT = (*TINY, "trainer.max_epochs=1", "run.name=a")
STEPS = 8

DEAD = """
import os
readers, writer = os.pipe()
os.dup2(writer, 1)
os.close(writer)
os.close(readers)
"""
FULL = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nos.dup2(1, 2)"
CLOSED = "import os, sys\nos.close(1)\nos.close(2)\nsys.stdout = sys.stderr = None"
# a pipe with room for 4096 bytes and a reader that reads nothing
FROZEN = """
import fcntl, os
import models.runs.record
models.runs.record.PATIENCE = 0.2
readers, writer = os.pipe()
fcntl.fcntl(writer, 1031, 4096)
os.dup2(writer, 1)
import models.callbacks.progress as progress
progress.RunProgress.on_train_batch_end = lambda *_: print("step " + 600 * "-", flush=True)
"""


def complete(folder: Path) -> bool:
    """Whether the run has left everything, as if nothing had happened."""
    steps = [row["step"] for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]
    names = ("metrics.json", "curves.png", "config.yaml", "env.json", "train.log", ".hydra/overrides.yaml")
    assert [name for name in names if not (folder / name).exists()] == []
    assert steps == [str(step) for step in range(STEPS)]
    assert json.loads((folder / "checkpoints/last/manifest.json").read_text())["step"] == STEPS
    assert "go on:    the same command with run.name=a" in (folder / "train.log").read_text()
    return True


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(DEAD, id="dead"),
        *(
            pytest.param(fault, id=name, marks=pytest.mark.full)
            for name, fault in (("full", FULL), ("closed", CLOSED), ("frozen", FROZEN))
        ),
    ],
)
def test_nobody_reads_the_output(tmp_path, fault):
    """A pipe whose reader has died, /dev/full, streams that are closed, a reader that stands still."""
    status, text = run(tmp_path, *SHORT, before=fault, pictures=True)
    assert status == 0, text
    assert complete(tmp_path / "outputs/a")
    assert "Exception ignored" not in text and "BrokenPipe" not in text
    if fault != CLOSED:
        assert "from here on it stands here only" in (tmp_path / "outputs/a/train.log").read_text()


@pytest.mark.full
def test_nobody_reads_what_eval_prints(tmp_path):
    assert run(tmp_path, *SHORT)[0] == 0
    status, text = run(tmp_path, "ckpt=outputs/a", program="eval.py", before=DEAD)
    assert (status, "BrokenPipe" in text) == (0, False), text
    assert (tmp_path / "outputs/a/checkpoints/metrics.json").exists()


@pytest.mark.case(17)
@pytest.mark.full
def test_eval_has_no_room_for_its_results(tmp_path):
    """The figures are printed, nothing half is left, and the status says so."""
    assert run(tmp_path, *SHORT)[0] == 0
    full = "import errno, os\nimport models.runs.report as r\n"
    full += "def _full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\nr.put = _full"
    status, text = run(tmp_path, "ckpt=outputs/a", program="eval.py", before=full)
    assert status == 74 and "Traceback" not in text and "│ top-1  " in text, text
    assert "eval: the results cannot be written in outputs/a" in text and "No space left on device" in text
    assert not [path for path in (tmp_path / "outputs/a").rglob("*.json") if not path.stat().st_size]


# every file of the run beside its checkpoints cannot be written until optimizer step 5, the others never
NO_ROOM = """
import errno, os, pathlib
import torch
_open, _step, _taken = pathlib.Path.open, torch.optim.AdamW.step, [0]
def _full(self, mode="r", *args, **kwargs):
    closed = _taken[0] < 5 or "metrics.csv" not in str(self) and "train.log" not in str(self)
    if closed and "outputs" in str(self) and "checkpoints" not in str(self) and set(mode) & set("wax"):
        if ".lock" not in str(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
    return _open(self, mode, *args, **kwargs)
def _stepped(self, *args, **kwargs):
    _taken[0] += 1
    return _step(self, *args, **kwargs)
pathlib.Path.open, torch.optim.AdamW.step = _full, _stepped
"""


@pytest.mark.full
@pytest.mark.case(17)
def test_the_disk_is_full_for_all_but_checkpoints(tmp_path):
    """The run goes on, says each file once, and what was logged is there when there is room again."""
    status, text = run(tmp_path, *SHORT, "attention=moh", before=NO_ROOM, pictures=True)
    assert status == 0, text
    folder = tmp_path / "outputs/a"
    rows = [row["step"] for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]
    assert rows == [str(step) for step in range(STEPS)]
    for name in ("config.yaml", ".hydra", "env.json", "routing.csv", "curves.png", "metrics.json"):
        assert text.count(f"{name} failed (No space left on device); the run goes on") == 1, text
    assert "everything goes to outputs/a" in (folder / "train.log").read_text()  # printed when there was no room
    assert json.loads((folder / "checkpoints/last/manifest.json").read_text())["step"] == STEPS


@pytest.mark.case(17)
@pytest.mark.full
def test_an_error_beside_the_end_does_not_hide_it(tmp_path):
    """A stop keeps its status where curves cannot be drawn, and so does an exception its traceback."""
    broken = "import models.runs.ending as e\ne.draw_curves = lambda *_: 1 / 0\n"
    stop = "import os, signal\nfrom models.callbacks.progress import RunProgress as P\n"
    stop += "P.on_train_batch_end = lambda *_: os.kill(os.getpid(), signal.SIGTERM)"
    status, text = run(tmp_path, *SHORT, before=broken + stop)
    assert status == 75 and "curves.png failed (ZeroDivisionError" in text, text


def test_lines_wait_for_room_in_the_log(tmp_path, monkeypatch):
    with record.recorded() as log:
        print("first")
        log.begin(tmp_path / "missing/train.log")
        print("second")
        (tmp_path / "missing").mkdir()
        print("third")
    found = [line.split("  ", 1)[1] for line in (tmp_path / "missing/train.log").read_text().splitlines()]
    assert found == ["first", "second", "third"]
