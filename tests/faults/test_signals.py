"""Signals to a whole job with loader workers, in every phase of a run, once and twice, and to steps that hang."""

import os
import signal
import time

import pytest

from models.checkpoints import read_manifest
from tests.faults.programs import TINY, digests, run, start

WORKERS = ("run.name=a", *TINY, "data.workers=2")
# a signal to the process group, from within: at a moment that is known
GROUP = "import os, signal\ndef send(*numbers):\n    for number in numbers: os.killpg(0, number)\n"
OPTIMIZER = (
    GROUP
    + """
from torch.optim.optimizer import register_optimizer_step_pre_hook
taken = []
def within(*given):
    taken.append(1)
    if len(taken) == 6: send(15)
register_optimizer_step_pre_hook(within)
"""
)
STEP = (
    GROUP
    + """
from models.tasks.classification import Classification as task
old = task.training_step
def training_step(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == {at}: {action}
    return old(self, batch, batch_idx)
task.training_step = training_step
"""
)
VALIDATION = (
    GROUP
    + """
from models.tasks.base import Task as task
old = task.validation_step
def validation_step(self, batch, batch_idx):
    if self.trainer.global_step == {step} and batch_idx == 1: {action}
    return old(self, batch, batch_idx)
task.validation_step = validation_step
"""
)
SAVING = (
    GROUP
    + """
from models.callbacks.directory_io import DirectoryCheckpointIO as plugin
old = plugin.save_checkpoint
def save_checkpoint(self, checkpoint, path, storage_options=None):
    if checkpoint["global_step"] == {step}: {action}
    return old(self, checkpoint, path, storage_options)
plugin.save_checkpoint = save_checkpoint
"""
)
CALLED = (
    GROUP
    + """
import {module} as module
old = module.{name}
def {name}(*arguments, **keywords):
    {action}
    return old(*arguments, **keywords)
module.{name} = {name}
"""
)


def saved(folder):
    last = folder / "outputs/a/checkpoints/last"
    return read_manifest(last)["step"] if last.exists() else 0


def children(pid):
    """Processes of the process group that are not the program itself."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != pid:
            try:
                if os.getpgid(int(entry)) == pid:
                    found.append(int(entry))
            except ProcessLookupError:
                pass
    return found


@pytest.mark.case(3)
def test_sigterm_to_the_job_saves_the_step(tmp_path):
    status, text = run(tmp_path, *WORKERS, before=STEP.format(at=(0, 2), action="send(15)"))
    assert status == 75 and "stopped by SIGTERM at step 3; to go on: resume=" in text
    assert "Traceback" not in text and saved(tmp_path) == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, *WORKERS)[0] == 0
    return digests(folder / "outputs/a")


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "before", "step"),
    [
        pytest.param("SIGUSR1", STEP.format(at=(1, 4), action="send(10)"), 13, marks=pytest.mark.case(4)),
        pytest.param("SIGHUP", STEP.format(at=(1, 7), action="send(1)"), 16, marks=pytest.mark.case(4)),
        pytest.param("SIGXCPU", STEP.format(at=(0, 7), action="send(24, 24)"), 8, marks=pytest.mark.case(4)),
        pytest.param("SIGTERM", STEP.format(at=(0, 0), action="send(15, 15)"), 1, marks=pytest.mark.case(3)),
        pytest.param("SIGTERM", VALIDATION.format(step=16, action="send(15)"), 16, marks=pytest.mark.case(6)),
        pytest.param("SIGUSR2", SAVING.format(step=8, action="send(12)"), 8, marks=pytest.mark.case(4)),
        pytest.param("SIGTERM", OPTIMIZER, 6, marks=pytest.mark.case(7)),
        pytest.param("SIGINT", STEP.format(at=(0, 5), action="send(2)"), 6, marks=pytest.mark.case(5)),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("SIG") else "",
)
def test_signals_in_training_validation_and_saving(tmp_path, whole, name, before, step):
    status, text = run(tmp_path, *WORKERS, before=before)
    assert status == (130 if name == "SIGINT" else 75), text
    assert f"stopped by {name} at step {step}" in text and "Traceback" not in text
    assert saved(tmp_path) == step
    assert run(tmp_path, *WORKERS)[0] == 0
    assert digests(tmp_path / "outputs/a") == whole


@pytest.mark.full
@pytest.mark.case(6)
def test_signals_in_a_validation_that_is_made_up_for(tmp_path, whole):
    """SIGUSR1 once more in the next start; under SLURM's environment Lightning would requeue the job."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "a", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost"}
    calls = tmp_path / "calls"
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho $@ >> {calls}\n")
    fake.chmod(0o755)
    slurm["PATH"] = f"{fake.parent}:{os.environ['PATH']}"
    for number in (15, 10, 12):
        action = f"send({number})"
        status, text = run(tmp_path, *WORKERS, before=VALIDATION.format(step=8, action=action), env=slurm)
        assert status == 75 and saved(tmp_path) == 8, text
    assert run(tmp_path, *WORKERS, env=slurm)[0] == 0
    assert digests(tmp_path / "outputs/a") == whole
    assert not calls.exists() and not list(tmp_path.rglob("hpc_ckpt*"))


@pytest.mark.full
@pytest.mark.case(3)
@pytest.mark.parametrize("name", ["find_resume", "headline", "build_loggers"])
def test_a_signal_before_training_ends_the_run_at_once(tmp_path, name):
    before = CALLED.format(module="models.runs.training", name=name, action="send(15)")
    status, text = run(tmp_path, *WORKERS, before=before)
    assert status == 75 and "stopped by SIGTERM; to go on, give the same command again" in text
    assert "Traceback" not in text and saved(tmp_path) == 0


@pytest.mark.full
@pytest.mark.case(3)
def test_a_signal_before_the_job_has_the_same_status(tmp_path):
    before = CALLED.format(module="models.runs.early", name="find_weights", action="send(15)")
    status, text = run(tmp_path, *WORKERS, before=before)
    assert status == 75 and "stopped by SIGTERM before training began" in text and "Traceback" not in text
    assert not (tmp_path / "outputs/a").exists()


@pytest.mark.full
@pytest.mark.case(3)
def test_a_signal_behind_training_leaves_the_rest_to_the_next_start(tmp_path, whole):
    before = CALLED.format(module="models.runs.training", name="_report", action="send(10, 15)")
    status, text = run(tmp_path, *WORKERS, before=before)
    assert status == 75 and "Traceback" not in text
    assert digests(tmp_path / "outputs/a") == whole
    assert run(tmp_path, *WORKERS)[0] == 0
    assert (tmp_path / "outputs/a/metrics.json").exists()


@pytest.mark.full
@pytest.mark.case(3)
def test_where_nothing_saves_a_stop_says_what_is_lost(tmp_path):
    before = STEP.format(at=(0, 5), action="send(15)")
    status, text = run(tmp_path, *WORKERS, "callbacks.preemption=null", "checkpoint.every_n_steps=4", before=before)
    assert status == 75 and "Traceback" not in text, text
    lost = "what came behind the last checkpoint is lost (callbacks.preemption=null)"
    assert f"stopped by SIGTERM; {lost}; to go on, give the same command again" in text, text
    assert saved(tmp_path) == 4


@pytest.mark.full
@pytest.mark.case(8)
def test_a_signal_among_accumulated_batches_waits_for_the_step(tmp_path):
    status, _ = run(
        *(tmp_path, *WORKERS, "trainer.accumulate_grad_batches=4"),
        before=STEP.format(at=(0, 5), action="send(15)"),
    )
    assert status == 75 and saved(tmp_path) == 2


HANGS = STEP.format(at=(0, 4), action="print('hangs', flush=True); __import__('time').sleep(1000)")


@pytest.mark.full
@pytest.mark.case(8)
def test_a_second_signal_ends_a_step_that_hangs(tmp_path):
    program = start(tmp_path, *WORKERS, "checkpoint.every_n_steps=2", before=HANGS)
    program.wait_for("hangs")
    program.send(signal.SIGTERM, group=True)
    time.sleep(3)  # more than what counts as one request
    program.send(signal.SIGTERM, group=True)
    assert program.wait(60) == 75
    assert "stopped by SIGTERM while the process hung in training_step" in program.text
    assert saved(tmp_path) == 4


@pytest.mark.full
@pytest.mark.case(8)
def test_one_signal_ends_a_step_that_hangs_after_a_while(tmp_path):
    program = start(tmp_path, *WORKERS, "callbacks.preemption.grace=2", before=HANGS)
    program.wait_for("hangs")
    program.send(signal.SIGUSR1)
    assert program.wait(60) == 75 and "while the process hung" in program.text


@pytest.mark.full
@pytest.mark.case(5)
def test_a_second_ctrl_c_ends_a_step_that_hangs(tmp_path):
    program = start(tmp_path, *WORKERS, before=HANGS)
    program.wait_for("hangs")
    program.send(signal.SIGINT)
    time.sleep(1)
    program.send(signal.SIGINT)
    assert program.wait(60) in (-2, 130)


@pytest.mark.full
@pytest.mark.case(14)
@pytest.mark.case(1)
def test_workers_die_with_the_run_and_do_not_hold_its_folder(tmp_path, whole):
    program = start(tmp_path, *WORKERS, before=STEP.format(at=(1, 1), action="print('here', flush=True); send(19)"))
    program.wait_for("here")
    program.send(signal.SIGKILL)
    assert program.wait(60) == -9
    end = time.monotonic() + 60
    while children(program.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert children(program.pid) == []  # although they were stopped
    assert run(tmp_path, *WORKERS)[0] == 0
    assert digests(tmp_path / "outputs/a") == whole


STOPPED_WORKERS = STEP.format(
    at=(0, 3),
    action="import multiprocessing; [os.kill(child.pid, 19) for child in multiprocessing.active_children()]",
)


@pytest.mark.full
@pytest.mark.case(43)
def test_workers_that_do_not_react_hold_nothing(tmp_path):
    started = time.monotonic()
    status, text = run(tmp_path, *WORKERS, "+data.timeout=4", before=STOPPED_WORKERS, timeout=120)
    assert status == 65 and "gave no batch for 4 seconds" in text and "Traceback" not in text, text
    assert time.monotonic() - started < 100


@pytest.mark.full
@pytest.mark.case(43)
def test_a_stop_does_not_wait_for_workers(tmp_path):
    before = STOPPED_WORKERS.replace("active_children()]", "active_children()]; send(15)")
    status, _ = run(tmp_path, *WORKERS, before=before, timeout=120)
    assert status == 75 and saved(tmp_path) == 4
