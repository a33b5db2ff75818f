"""A process of several is killed, fails or hangs: the job ends soon with that one's error, and goes on where it was."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.faults.programs import ROOT, TINY, digests, run, start

TWO = (*TINY, "trainer=ddp_cpu", "trainer.accelerator=cpu", "data.batch_size=8", "data.workers=0")
# what a process does at a step: put in place of a hook of Lightning's module that all tasks have
AT_STEP = """
import os, signal, time
import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only
rank_zero_only.rank = {rank}
real = pl.LightningModule.on_train_batch_start
def hook(self, batch, batch_idx):
    if self.global_step == {step}:
        {fault}
pl.LightningModule.on_train_batch_start = hook
"""


def two(folder: Path, fault: str, *arguments: str, step: int = 5):
    """Both processes of a run, as srun starts them; the fault is in process 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        start(
            folder,
            *(*TWO, "run.name=a", *arguments),
            before=AT_STEP.format(rank=rank, step=step, fault=fault if rank else "pass"),
            env={"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]


def error_of(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"outputs/a/errors/rank{rank}.json").read_text())


@pytest.mark.case(12)
def test_an_exception_of_one_process_is_that_of_the_job(tmp_path):
    zero, one = two(tmp_path, "raise ValueError('the fault of one')")
    assert zero.wait(90) == 1 and one.wait(30) == 1
    assert "process 1 of 2 on" in zero.text and "failed with ValueError: the fault of one at step 5" in zero.text
    assert "Traceback" not in zero.text and one.text == ""
    assert "the fault of one" in error_of(tmp_path, 1)["traceback"] and error_of(tmp_path, 1)["step"] == 5
    assert error_of(tmp_path, 0)["error"].startswith("process 1 of 2")


@pytest.mark.full
@pytest.mark.case(12)
@pytest.mark.parametrize("status", [2, 65])
def test_the_status_is_that_of_the_process_that_failed(tmp_path, status):
    kind = {2: "UserError", 65: "DataFailed"}[status]
    zero, one = two(tmp_path, f"from conf.errors import {kind}; raise {kind}('data: what is wrong')")
    assert (zero.wait(90), one.wait(30)) == (status, status)
    assert f"failed with {kind}: data: what is wrong" in zero.text and "Traceback" not in zero.text


@pytest.mark.full
@pytest.mark.case(12)
def test_an_error_of_process_0_ends_the_others(tmp_path):
    """Lightning has started the other one."""
    fault = AT_STEP.format(rank=0, step=3, fault="raise KeyError('of zero')")
    program = start(tmp_path, *TWO, "run.name=a", before=fault)
    assert program.wait(120) == 1
    assert "Traceback" in program.text and "KeyError: 'of zero'" in program.text
    assert not members_of(program.pid)
    assert "failed with KeyError: 'of zero' at step 3" in error_of(tmp_path, 1)["error"]


@pytest.mark.full
@pytest.mark.case(10)
@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_job_and_is_named(tmp_path, dead):
    zero, one = two(tmp_path, "time.sleep(0)", "trainer.max_epochs=300")
    zero.wait_for("epoch 1/300")
    (zero, one)[dead].send(signal.SIGKILL)
    left = (one, zero)[dead]
    assert left.wait(60) == 1
    assert f"process {dead} of 2 on {socket.gethostname()}" in left.text
    assert ("has died" if dead else "does not answer any more") in left.text
    assert error_of(tmp_path, 1 - dead)["error"].startswith(f"process {dead} of 2")


@pytest.mark.full
@pytest.mark.case(10)
def test_the_same_command_goes_on_after_a_kill(tmp_path):
    """Started by Lightning; the bits are those of a run that nobody has killed."""
    often = (*TWO, "checkpoint.every_n_steps=1", "trainer.max_epochs=2")
    assert run(tmp_path / "whole", *often, "run.name=a")[0] == 0
    program = start(tmp_path, *often, "run.name=a")
    program.wait_for("epoch 1/2")
    (child,) = children_of(program.pid)
    os.kill(child, signal.SIGKILL)
    assert program.wait(60) == 1
    assert "process 1 of 2 on" in program.text and "was killed by SIGKILL" in program.text
    status, text = run(tmp_path, *often, "run.name=a")
    assert status == 0, text
    assert digests(tmp_path / "outputs/a") == digests(tmp_path / "whole/outputs/a")


@pytest.mark.full
@pytest.mark.case(11)
@pytest.mark.parametrize("deaf", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN); "])
def test_a_hanging_process_ends_the_job_and_is_named(tmp_path, deaf):
    zero, one = two(tmp_path, f"{deaf}time.sleep(300)", "trainer.timeout=8")
    assert zero.wait(90) == 1
    assert "process 1 of 2 on" in zero.text and "did not come within 8 s (trainer.timeout) at step 5" in zero.text
    assert one.wait(60) == 1
    assert "time.sleep" in error_of(tmp_path, 1)["traceback"] or "hook" in error_of(tmp_path, 1)["traceback"]


@pytest.mark.full
@pytest.mark.case(10)
def test_torchrun_starts_all_again_and_the_bits_are_the_same(tmp_path):
    """Process 1 kills itself in the first attempt."""
    often = (*TWO, "checkpoint.every_n_steps=1", "trainer.max_epochs=2", "run.name=a")
    assert run(tmp_path / "whole", *often)[0] == 0
    (tmp_path / "sitecustomize.py").write_text(SUICIDE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    script = f"import os; os.execv({sys.executable!r}, {[*torchrun, str(ROOT / 'train.py'), *often]!r})"
    status, text = run(tmp_path, before=script, env={"PYTHONPATH": str(tmp_path)}, timeout=200)
    assert status == 0, text
    assert (tmp_path / "killed").exists()
    assert digests(tmp_path / "outputs/a") == digests(tmp_path / "whole/outputs/a")


SUICIDE = """
import os
if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    import threading, time, signal, pathlib
    def kill():
        while not list(pathlib.Path("outputs/a/checkpoints").glob("step-00000003")):
            time.sleep(0.01)
        pathlib.Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=kill, daemon=True).start()
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def members_of(group: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getpgid(int(folder.name)) == group:
                found.append(int(folder.name))
        except ProcessLookupError:
            continue
    return found
