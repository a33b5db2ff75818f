"""A run that ends with an error loses no finished step, and goes on with the same bits."""

import sys

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from models.callbacks.checkpoint import Checkpoints
from models.checkpoints import latest, read_manifest
from tests.models.callbacks.tiny_run import Samples, fingerprint, fit


class Broken(Callback):
    """Raises at one place of one batch: its data, its forward pass (behind running statistics), its optimizer step."""

    def __init__(self, monkeypatch, place, epoch, number, error=RuntimeError):
        self.place, self.at, self.error, self.patch = place, (epoch, number), error, monkeypatch
        if place == "data":
            real = Samples.__getitem__
            monkeypatch.setattr(Samples, "__getitem__", lambda samples, key: self._raise(key) or real(samples, key))

    def _raise(self, at):
        if at == self.at:
            raise self.error("an error of a test")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        at = batch.epoch, batch.number
        if self.place == "forward":
            pl_module.model[3].forward = lambda x: (
                self._raise(at) or torch.nn.functional.linear(x, pl_module.model[3].weight, pl_module.model[3].bias)
            )
        if self.place == "optimizer":
            self._break_the_step(at)

    def _break_the_step(self, at):
        if at == self.at:
            self.patch.setattr(sys.modules["torch.optim.adam"], "adam", half)


def half(weights, *_, **__):
    """Some of the weights have been changed when it breaks."""
    weights[0].zero_()
    raise ZeroDivisionError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = {}

    def get(accumulate):
        if accumulate not in runs:
            folder = tmp_path_factory.mktemp("whole")
            runs[accumulate] = fingerprint(*fit(folder, accumulate_grad_batches=accumulate))
        return runs[accumulate]

    return get


@pytest.mark.case(38)
@pytest.mark.case(43)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("place", ["data", "forward"])
@pytest.mark.parametrize("at", [(0, 4), *(pytest.param(at, marks=pytest.mark.full) for at in ((1, 0), (1, 7)))])
def test_an_error_loses_no_finished_step(tmp_path, monkeypatch, whole, caplog, place, at, accumulate):
    """With 8 batches an epoch, and no other save than those around validations."""
    keywords = {"accumulate_grad_batches": accumulate, "every": 0, "limit_val_batches": 3}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="an error of a test"):
        fit(tmp_path, callbacks=(Broken(patch, place, *at),), **keywords)
    batches, per_epoch = at[1], -(-8 // accumulate)
    step = at[0] * per_epoch + batches // accumulate
    last = latest(tmp_path / "checkpoints")
    assert read_manifest(last)["step"] == step
    assert ("was saved on the way out" in caplog.text) == (step != per_epoch)
    task, trainer = fit(tmp_path, resume="auto", **keywords)
    assert task.seen[0] == (at[0], batches - batches % accumulate)
    found, expected = fingerprint(task, trainer), whole(accumulate)
    assert [name for name in expected if not same(found[name], expected[name])] == []


def same(found, expected):
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def test_half_a_step_is_never_saved(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        fit(tmp_path, every=3, callbacks=(Broken(patch, "optimizer", 0, 4),))
    assert latest(tmp_path / "checkpoints").name == "step-00000003"


def test_an_error_of_the_storage_on_the_way_out_hides_nothing(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="an error of a test"):
        patch.setattr("models.callbacks.directory_io.write_checkpoint", full)
        fit(tmp_path, callbacks=(Broken(patch, "data", 0, 2),))
    assert "step 2 could not be saved in" in caplog.text and "No space left on device" in caplog.text


def test_of_several_processes_none_saves_alone(tmp_path):
    """The others may be anywhere, and a save waits for them."""
    saver, alone = Checkpoints(), type("Trainer", (), {"world_size": 1, "global_step": 0})
    saver._boundary = object()
    assert saver._between_steps(alone)
    assert not saver._between_steps(type("Trainer", (), {"world_size": 2, "global_step": 0}))
    saver._stepping = True
    assert not saver._between_steps(alone)
