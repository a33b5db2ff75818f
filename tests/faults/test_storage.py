"""Storage that fails, and a writer that is killed at any of its calls: no complete checkpoint is ever lost."""

import contextlib
import json
import os
import shutil

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from safetensors.torch import load_file

from conf.errors import StorageFailed
from models.callbacks.checkpoint import Checkpoints
from models.callbacks.retention import Retention
from models.checkpoints import latest, read_manifest, resolve, verify
from models.checkpoints.format.directory import step_directories, step_name
from models.checkpoints.format.write import recover, sweep, write_checkpoint
from tests.faults.programs import TINY, digests, run, start
from tests.models.callbacks.tiny_run import fingerprint, fit

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "link", "symlink", "unlink", "rmdir", "close")


class Dead(BaseException):
    """What SIGKILL is to a process: from here on it does nothing more, also in no `finally`."""


class Killer:
    """Lets so many calls of the system pass, and none after them."""

    def __init__(self, monkeypatch, left):
        self.left = left
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real):
        def call(*arguments, **keywords):
            self.left -= 1
            if self.left < 0:
                raise Dead
            return real(*arguments, **keywords)

        return call


def save(folder, step, value, standing=None):
    tensors = {"model.safetensors": {"w": torch.full((3,), float(step))}, "trainer.safetensors": {}}
    manifest = {"step": step, "epoch": 0, "metrics": {"value": value}}
    return write_checkpoint(folder / step_name(step), tensors, {"trainer.json": {"value": value}}, manifest, standing)


def story(folder, done):
    """As a run saves: a step, the same with its metrics, and then what is no longer kept is deleted."""
    kept = Retention(keep=0)
    files = save(folder, 2, 0)
    done.append((2, 0))
    kept.rank(0.5, 2)
    save(folder, 2, 1, files)
    done.append((2, 1))
    kept.arrange(folder, folder / step_name(2))
    kept.delete(folder, folder / step_name(2))
    done.append("all")


@pytest.mark.case(2)
@pytest.mark.case(21)
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.full)])
def test_a_writer_killed_at_any_call_loses_nothing(tmp_path, stride):
    """At every call that changes the disk, until the story comes to its end."""
    for left in range(0, 1000, stride):
        folder, done = tmp_path / str(left), []
        save(folder, 1, 0)
        with pytest.MonkeyPatch.context() as patch:
            Killer(patch, left)
            with contextlib.suppress(Dead):
                story(folder, done)
        recover(folder)
        newest = read_manifest(latest(folder, pytest.fail))
        reached = (newest["step"], newest["metrics"]["value"])
        assert reached >= max([entry for entry in done if entry != "all"], default=(1, 0)), left
        assert load_file(folder / step_name(newest["step"]) / "model.safetensors")["w"][0] == newest["step"]
        again = Retention(keep=0)
        sweep(folder)
        again.arrange(folder, folder / step_name(newest["step"]))
        again.delete(folder, folder / step_name(newest["step"]))
        assert list(step_directories(folder)) == [newest["step"]] and resolve(folder / "last").name == step_name(
            reached[0]
        )
        assert not [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]
        shutil.rmtree(folder)
        if "all" in done:
            break
    assert 50 < left < 999


class At(Callback):
    """Does something at the beginning of one batch."""

    def __init__(self, epoch, number, action):
        self.at, self.action = (epoch, number), action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (batch.epoch, batch.number) == self.at:
            self.action()


def test_a_folder_that_is_removed_under_a_run_is_made_again(tmp_path):
    saver = Checkpoints(every_n_steps=2)
    gone = At(1, 1, lambda: (saver.saver.leave(), shutil.rmtree(tmp_path / "checkpoints")))
    whole = fingerprint(*fit(tmp_path / "whole"))
    found = fingerprint(*fit(tmp_path, callbacks=(gone,), checkpoints=saver))
    assert torch.equal(found["model.0.weight"], whole["model.0.weight"])
    assert verify(tmp_path / "checkpoints" / "last")["step"] == 16 and step_name(14) in os.listdir(
        tmp_path / "checkpoints"
    )


@pytest.mark.case(17)
@pytest.mark.case(19)
@pytest.mark.parametrize("number", [28, 30, 122, 5], ids=["full", "read-only", "quota", "broken"])
def test_storage_that_fails_from_some_step_on_ends_the_run_with_its_status(tmp_path, number):
    """The sentence names the folder, what was needed and what is free; the checkpoints of before stay."""

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    saver = Checkpoints(every_n_steps=3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageFailed) as end:
        broken = At(0, 5, lambda: (saver.saver.leave(), patch.setattr(os, "fsync", fails)))
        fit(tmp_path, checkpoints=saver, callbacks=(broken,))
    folder = tmp_path / "checkpoints"
    text = str(end.value)
    assert end.value.status == 74 and os.strerror(number) in text and f"could not be saved in {folder}" in text
    assert "bytes needed, " in text and "bytes free); 3 saves in a row failed" in text
    assert verify(folder / "last")["step"] == 3 and f"goes on from {folder / step_name(3)}" in text
    assert sorted(os.listdir(folder)) == ["last", step_name(3)]


# Real processes

FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    status, text = run(folder, "run.name=a", *TINY)
    assert status == 0, text
    return digests(folder / "outputs/a")


@pytest.mark.case(17)
@pytest.mark.full
def test_a_full_disk_ends_a_run_with_status_74_and_the_next_goes_on(tmp_path, whole):
    status, text = run(tmp_path, "run.name=a", *TINY, "checkpoint.every_n_steps=4", before=FULL)
    folder = tmp_path / "outputs/a/checkpoints"
    assert status == 74 and "Traceback" not in text, text
    assert "File too large" in text and "bytes needed" in text and "3 saves in a row failed" in text
    assert list(step_directories(folder)) == [] and not list(folder.glob(".*"))
    status, text = run(tmp_path, "run.name=a", *TINY)
    assert status == 0 and digests(tmp_path / "outputs/a") == whole, text


@pytest.mark.case(18)
@pytest.mark.full
def test_the_folder_for_temporary_files_is_not_used(tmp_path, whole):
    status, text = run(tmp_path, "run.name=a", *TINY, env={"TMPDIR": str(tmp_path / "nowhere")})
    assert status == 0 and digests(tmp_path / "outputs/a") == whole, text


KILL_AT_END = """
from models.callbacks.checkpoint import Checkpoints
real = Checkpoints.on_train_batch_end
def end(self, trainer, *arguments):
    real(self, trainer, *arguments)
    if trainer.global_step == 19:
        self.saver.leave()
        import os
        os.kill(os.getpid(), 9)
Checkpoints.on_train_batch_end = end
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed at step 19 with checkpoints of every fourth step."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ("checkpoint.every_n_steps=4", "checkpoint.keep=9")
    status, text = run(folder, "run.name=a", *TINY, *arguments, before=KILL_AT_END)
    assert status == -9, text
    assert list(step_directories(folder / "outputs/a/checkpoints")) == [4, 8, 12, 16]
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "a bit of the weights": lambda path: flip(path / "model.safetensors"),
    "a bit of the optimizer": lambda path: flip(path / "trainer.safetensors"),
    "a bit of the average": lambda path: flip(path / "ema.safetensors"),
    "a bit of the state": lambda path: flip(path / "trainer.json"),
    "half a file": lambda path: os.truncate(path / "model.safetensors", 5000),
    "an empty manifest": lambda path: (path / "manifest.json").write_text(""),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "a file that is missing": lambda path: (path / "trainer.safetensors").unlink(),
}


@pytest.mark.case(20)
@pytest.mark.full
@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_said(tmp_path, killed, whole, damage):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True, symlinks=True)
    DAMAGES[damage](tmp_path / "outputs/a/checkpoints" / step_name(16))
    status, text = run(tmp_path, "run.name=a", *TINY)
    assert status == 0 and "skipping a damaged checkpoint" in text and step_name(16) in text, text
    assert "continues from outputs/a/checkpoints/step-00000012" in text
    assert digests(tmp_path / "outputs/a") == whole


@pytest.mark.case(20)
@pytest.mark.full
@pytest.mark.parametrize("how", ["damaged", "format 2"])
def test_where_no_checkpoint_can_be_read_nothing_is_started_and_nothing_deleted(tmp_path, killed, how):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True, symlinks=True)
    folder = tmp_path / "outputs/a/checkpoints"
    for path in step_directories(folder).values():
        if how == "damaged":
            flip(path / "model.safetensors")
        else:
            manifest = json.loads((path / "manifest.json").read_text()) | {"format": 2}
            (path / "manifest.json").write_text(json.dumps(manifest))
    before = sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))
    for extra in ((), ("resume=null",), ("trainer.max_epochs=9",)):
        status, text = run(tmp_path, "run.name=a", *TINY, *extra)
        assert status == 2 and "Traceback" not in text and "epoch 1/" not in text, text
    assert sorted((str(path), path.stat().st_size) for path in folder.rglob("*")) == before


@pytest.mark.case(22)
@pytest.mark.full
def test_the_clock_decides_nothing(tmp_path, killed, whole):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True, symlinks=True)
    for step, path in step_directories(tmp_path / "outputs/a/checkpoints").items():
        for file in (*path.iterdir(), path):
            os.utime(file, (2e9 - step, 2e9 - step))
    back = "import time; real = time.time; time.time = lambda: real() - 1e7"
    status, text = run(tmp_path, "run.name=a", *TINY, before=back)
    assert status == 0 and "continues from outputs/a/checkpoints/step-00000016" in text, text
    assert digests(tmp_path / "outputs/a") == whole


KILLED_CALL = f"""
import os, threading
left = [LEFT]
def counted(real):
    def call(*arguments, **keywords):
        if threading.current_thread().name == "checkpoint writer":
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)
        return real(*arguments, **keywords)
    return call
for name in {CALLS}:
    setattr(os, name, counted(getattr(os, name)))
"""


def kill_and_go_on(folder, left, whole):
    """Killed at a call of the writer, started again: whether it had been killed at all."""
    status, text = run(folder, "run.name=a", *TINY, before=KILLED_CALL.replace("LEFT", str(left)))
    assert status in (0, -9), text
    if status == -9:
        status, text = run(folder, "run.name=a", *TINY)
        assert status == 0, text
        assert digests(folder / "outputs/a") == whole, left
        assert not list((folder / "outputs/a/checkpoints").glob(".*"))
        return True
    return False


@pytest.mark.case(2)
@pytest.mark.full
@pytest.mark.parametrize("left", [3, 40, 95])
def test_a_run_killed_while_it_saves_goes_on_exactly(tmp_path, whole, left):
    assert kill_and_go_on(tmp_path, left, whole)


@pytest.mark.case(2)
@pytest.mark.faults
def test_a_run_killed_at_any_call_of_its_writer_goes_on_exactly(tmp_path, whole):
    count = 0
    for left in range(0, 1000, 6):
        if not kill_and_go_on(tmp_path / str(left), left, whole):
            break
        count += 1
        shutil.rmtree(tmp_path / str(left))
    assert count > 20


@pytest.mark.case(17)
@pytest.mark.full
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, whole):
    """Saves of steps 4 and 8 fail; there is room again from step 9 on."""
    for_a_while = (
        FULL
        + """
from models.callbacks.checkpoint import Checkpoints
real = Checkpoints.on_train_batch_end
def end(self, trainer, *arguments):
    if trainer.global_step == 9:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    real(self, trainer, *arguments)
Checkpoints.on_train_batch_end = end
"""
    )
    program = start(tmp_path, "run.name=a", *TINY, before=for_a_while)
    assert program.wait() == 0, program.text
    assert program.text.count("could not be saved in") == 2, program.text
    assert digests(tmp_path / "outputs/a") == whole
