"""Checkpoints are written beside training: of the tensors as they were, one at a time, and once."""

import logging
import threading

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from models.callbacks import directory_io
from models.callbacks.checkpoint import Checkpoints
from models.callbacks.preemption import Stopped
from models.callbacks.saving import Saver
from models.callbacks.snapshot import Snapshot
from models.callbacks.writer import Writer
from models.checkpoints import load_weights, verify
from models.checkpoints.format.directory import step_directories
from models.checkpoints.format.write import write_checkpoint
from tests.models.callbacks.tiny_run import fingerprint, fit


class SlowStorage(Callback):
    """Holds the writer back from the moment a step is saved until another step has been trained."""

    def __init__(self, monkeypatch, step, until):
        self.step, self.until, self.gate, self.began = step, until, threading.Event(), []

        def slow(path, *arguments):
            self.began.append(path.name)
            if path.name == f"step-{step:08d}" and not self.gate.wait(60):
                raise AssertionError("training stood still")
            return write_checkpoint(path, *arguments)

        monkeypatch.setattr(directory_io, "write_checkpoint", slow)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.until:
            self.gate.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch, caplog):
    """The file holds the weights of its step and not those of the steps trained meanwhile."""
    expected = fingerprint(*fit(tmp_path / "whole", every=3))
    weights = load_weights(fit_until(tmp_path / "short", 3))
    caplog.set_level(logging.INFO)
    caplog.clear()
    storage = SlowStorage(monkeypatch, step=3, until=5)
    task, trainer = fit(tmp_path / "slow", callbacks=(storage,), checkpoints=keep_all(every_n_steps=3))
    found = fingerprint(task, trainer)
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in expected)
    path = tmp_path / "slow" / "checkpoints" / "step-00000003"
    verify(path)
    assert all(torch.equal(value, weights[name]) for name, value in load_weights(path).items())
    assert caplog.text.count("MiB, training pauses 0.") == 1 and "s for each, written beside it in" in caplog.text


@pytest.mark.case(17)
def test_a_save_is_left_out_where_the_storage_is_slow(tmp_path, monkeypatch, caplog):
    """The write of step 2 lasts until step 7 begins: 4 and 6 are left out, and nothing is begun twice."""
    monkeypatch.setattr(Saver, "PATIENCE", 0.01)
    storage = SlowStorage(monkeypatch, step=2, until=7)
    fit(tmp_path, epochs=1, callbacks=(storage,), checkpoints=keep_all(every_n_steps=2))
    assert storage.began == ["step-00000002", "step-00000008", "step-00000008"]
    assert list(step_directories(tmp_path / "checkpoints")) == [2, 8]
    assert caplog.text.count("the save of step 2 in") == 1 and "left out where the storage is so slow" in caplog.text


@pytest.mark.case(17)
def test_a_checkpoint_that_stays_for_ever_is_never_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "begin_unless_slow", lambda *_: None)
    checkpoints = keep_all(every_n_steps=2, keep_every_n_steps=3)
    fit(tmp_path, epochs=1, checkpoints=checkpoints)
    assert list(step_directories(tmp_path / "checkpoints")) == [3, 6, 8]


def test_after_a_validation_the_tensors_are_not_written_again(tmp_path, monkeypatch):
    written = []

    def note(path, tensors, plain, manifest, standing):
        written.append((path.name, standing is None))
        return write_checkpoint(path, tensors, plain, manifest, standing)

    monkeypatch.setattr(directory_io, "write_checkpoint", note)
    fit(tmp_path, every=0, epochs=2)
    assert written == [(f"step-{step:08d}", first) for step in (8, 16) for first in (True, False)]
    manifest = verify(tmp_path / "checkpoints" / "last")
    assert "val/top1" in manifest["metrics"]


def test_a_stop_waits_for_what_is_written(tmp_path, monkeypatch):
    """The step in the message is on the disk, whatever the speed of the storage."""
    storage = SlowStorage(monkeypatch, step=3, until=99)
    threading.Timer(0.3, storage.gate.set).start()
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 3; to go on: resume="):
        fit(tmp_path, callbacks=(storage,), signals={"0.2": "SIGTERM"})
    assert verify(tmp_path / "checkpoints" / "last")["step"] == 3 and storage.began == ["step-00000003"]


def test_a_snapshot_copies_and_tells_bits_apart():
    weight, step = torch.tensor([0.0, float("nan"), 2.0]), torch.tensor(1)
    view = torch.arange(6.0).reshape(2, 3).t()
    snapshot = Snapshot()
    tensors = {"model": {"w": weight, "tied": weight}, "trainer": {"step": step, "view": view}}
    assert snapshot.take(tensors) and not snapshot.take(tensors, compare=True)
    place, size = snapshot.content["model"]["w"].data_ptr(), snapshot.bytes
    assert size == 12 + 12 + 8 + 24 and snapshot.content["trainer"]["view"].is_contiguous()
    weight[0] = -0.0
    assert snapshot.content["model"]["w"][0].signbit() == 0 and snapshot.take(tensors, compare=True)
    assert snapshot.content["model"]["w"].data_ptr() == place, "the same memory"
    assert snapshot.take({"model": {"w": weight}}, compare=True) and list(snapshot.content) == ["model"]
    assert snapshot.take({"model": {"w": weight.double()}}, compare=True)
    assert snapshot.content["model"]["w"].dtype == torch.float64


def test_a_writer_does_one_thing_at_a_time_and_keeps_its_error():
    done, gate = [], threading.Event()
    writer = Writer(after=lambda: done.append("after"))

    def work():
        gate.wait(60)
        done.append("work")

    writer.start(work, 7)
    assert writer.busy and not writer.wait(0) and done == [] and writer.bytes == 7
    threading.Timer(0.05, gate.set).start()
    writer.start(lambda: 1 / 0)
    assert writer.wait() and not writer.busy and done == ["work", "after"]
    assert isinstance(writer.error, ZeroDivisionError)


def test_a_writer_without_a_thread_writes_all_the_same(monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    done = []
    writer = Writer()
    writer.start(lambda: done.append(1))
    assert done == [1] and writer.wait()


def keep_all(**keywords):
    return Checkpoints(keep=99, **keywords)


def fit_until(folder, step):
    fit(folder, max_steps=step)
    return folder / "checkpoints" / f"step-{step:08d}"
