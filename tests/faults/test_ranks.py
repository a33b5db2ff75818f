"""A process of several is killed, fails or hangs: the job ends soon with that one's error, and goes on where it was."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from models.checkpoints.format.directory import verify
from tests.faults.programs import ROOT, TINY, Program, digests, run, start

TWO = (*TINY, "trainer=ddp_cpu", "trainer.accelerator=cpu", "data.batch_size=8", "data.workers=0")
# what a process does at a step: put in place of a hook of all tasks
AT_STEP = """
import os, signal, time
from pytorch_lightning.utilities import rank_zero_only
from models.tasks.base import Task
rank_zero_only.rank = {rank}
real = Task.on_train_batch_start
def hook(self, batch, batch_idx):
    if self.global_step == {step}:
        {fault}
    return real(self, batch, batch_idx)
Task.on_train_batch_start = hook
"""


def two(folder: Path, fault: str, *arguments: str, step: int = 5) -> list[Program]:
    """Both processes of a run; the fault is in process 1."""
    faults = [AT_STEP.format(rank=rank, step=step, fault=fault if rank else "pass") for rank in range(2)]
    return both(folder, faults, *arguments)


def both(folder: Path, faults: list[str], *arguments: str) -> list[Program]:
    """Both processes of a run, as srun starts them, each with what it runs first."""
    port = free_port()
    return [
        start(
            folder,
            *(*TWO, "run.name=a", *arguments),
            before=fault,
            env={"LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank, fault in enumerate(faults)
    ]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


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
@pytest.mark.case(12)
def test_an_error_of_process_0_before_the_meeting_leaves_nobody_waiting(tmp_path):
    """The other one would wait for `trainer.timeout`."""
    fault = "import models.engines.distributed as module\ndef meet(*_): raise KeyError('of zero')\nmodule.meet = meet"
    program = start(tmp_path, *TWO, "run.name=a", before=fault)
    assert program.wait(60) == 1 and "KeyError: 'of zero'" in program.text
    assert not members_of(program.pid)


@pytest.mark.full
@pytest.mark.case(10)
@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_job_and_is_named(tmp_path, dead):
    """With loader processes, which have copies of its connections and outlive it for a while."""
    zero, one = two(tmp_path, "time.sleep(0)", "trainer.max_epochs=300", "data.workers=1")
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
@pytest.mark.case(11)
def test_a_process_that_never_comes_is_one_sentence(tmp_path):
    alone = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    status, text = run(tmp_path, *TWO, "run.name=a", "trainer.timeout=3", env=alone)
    assert status == 1 and "Traceback" not in text, text
    assert "trainer: process 0 of 2 has not met all others within 3 s" in text and "or raise trainer.timeout" in text


@pytest.mark.faults
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


@pytest.mark.full
@pytest.mark.case(17)
@pytest.mark.parametrize(
    ("fault", "statuses", "message"),
    [
        ("raise OSError(28, 'No space left on device')", (74, 74), "step 6 could not be saved"),
        ("os.kill(os.getpid(), 9)", (1, -9), "process 1 of 2 on"),
    ],
)
def test_a_process_that_cannot_write_its_share_leaves_the_checkpoint_of_before(tmp_path, fault, statuses, message):
    """Process 1 has a full disk at every save after the first, or is killed in it."""
    source = f"""{AT_STEP.format(rank="{rank}", step=-1, fault="pass")}
import models.engines.pieces as pieces
new, saves = pieces.NewFile, set()
def full(path):
    saves.add(path.parent)
    if {{rank}} and len(saves) > 1:
        {fault}
    return new(path)
pieces.NewFile = full
"""
    settings = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    faults = [source.format(rank=rank) for rank in range(2)]
    zero, one = both(tmp_path, faults, *settings, "checkpoint.every_n_steps=3")
    assert (zero.wait(120), one.wait(60)) == statuses, zero.text
    assert message in zero.text and ("No space left on device" in zero.text) is (statuses[0] == 74)
    folder = tmp_path / "outputs/a/checkpoints"
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == ["last", "step-00000003"]
    assert verify(folder / "last")["step"] == 3
    if statuses[0] == 74:
        assert not list(folder.glob(".*"))


@pytest.mark.full
@pytest.mark.case(44)
def test_a_bad_loss_of_one_process_is_left_out_where_weights_are_shared(tmp_path):
    """Only process 1 finds something: what looks for the place must not wait for the other one."""
    fault = f"""{AT_STEP.format(rank="{rank}", step=-1, fault="pass")}
from models.tasks.classification import Classification
step = Classification.training_step
def bad(self, batch, number):
    loss = step(self, batch, number)
    return loss * float("nan") if {{rank}} and number == 2 else loss
Classification.training_step = bad
"""
    settings = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    faults = [fault.format(rank=rank) for rank in range(2)]
    zero, one = both(tmp_path, faults, *settings, "trainer.max_epochs=1", "trainer.timeout=60")
    assert (zero.wait(120), one.wait(60)) == (0, 0), zero.text
    assert "step 3, epoch 0: the training loss is NaN or infinite; the step is left out (1 in a row" in zero.text
    assert "loss nan" in zero.text


@pytest.mark.full
@pytest.mark.case(46)
@pytest.mark.parametrize("images", [9, 11])
def test_evaluation_by_two_is_that_by_one(tmp_path, images):
    """Every image counts once, whatever remains."""
    assert run(tmp_path, *TINY, "trainer.max_epochs=1", "data.workers=0", "run.name=a")[0] == 0
    figures = []
    for devices in (1, 2):
        settings = (f"data.source.val_images={images}", "data.batch_size=4", "data.workers=0")
        spread = ("trainer.accelerator=cpu", f"trainer.devices={devices}")
        status, text = run(tmp_path, "ckpt=outputs/a", *settings, *spread, program="eval.py")
        assert status == 0, text
        figures.append(json.loads((tmp_path / "outputs/a/checkpoints/metrics.json").read_text()))
    for name in ("val/top1", "val/top1_ema"):
        assert figures[0][name] == figures[1][name]
        assert (figures[0][name] * images) % 1 == pytest.approx(0, abs=1e-5)
    assert figures[0]["val/loss"] == pytest.approx(figures[1]["val/loss"], rel=1e-6)


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
