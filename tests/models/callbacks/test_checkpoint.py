"""Checkpoints hold what Lightning gives, are written when they should be, and survive trouble with the storage."""

import json
import warnings

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from models.callbacks.checkpoint import Checkpoints
from models.callbacks.directory_io import DirectoryCheckpointIO
from models.checkpoints import load_weights, read_config, read_manifest
from models.checkpoints.format.directory import step_directories
from tests.models.callbacks.tiny_run import fingerprint, fit


class Scores(Callback):
    """Replaces the logged metric by given scores, one for each validation."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", self.scores.pop(0))


def steps(folder):
    return list(step_directories(folder / "checkpoints"))


def target(folder, name):
    return (folder / "checkpoints" / name).resolve().name


def test_what_is_written(tmp_path):
    task, trainer = fit(tmp_path)
    path = tmp_path / "checkpoints" / "last"
    assert sorted(entry.name for entry in path.iterdir()) == [
        "config.json",
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "trainer.json",
        "trainer.safetensors",
    ]
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["epoch"]) == (16, 1) and "torch" in manifest["versions"]
    assert manifest["metrics"]["val/top1"] == pytest.approx(float(trainer.callback_metrics["val/top1"]))
    assert read_config(path) == {"seed": 3}
    weights, average = load_weights(path), load_weights(path, ema=True)
    assert weights.keys() == average.keys() == task.model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in task.model.state_dict().items())
    assert all(torch.equal(average[name], value) for name, value in task.ema_model.state_dict().items())
    assert not torch.equal(weights["0.weight"], average["0.weight"])


def test_what_lightning_gives_comes_back(tmp_path):
    saved = {}

    class Keep(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.update(checkpoint)

    fit(tmp_path, epochs=1, callbacks=(Keep(),))
    loaded = DirectoryCheckpointIO().load_checkpoint(tmp_path / "checkpoints" / "last")
    for key in ("epoch", "global_step", "loops", "callbacks", "lr_schedulers", "Data"):
        assert loaded[key] == saved[key], key
    assert loaded["state_dict"].keys() == saved["state_dict"].keys()
    assert loaded["optimizer_states"][0]["param_groups"] == saved["optimizer_states"][0]["param_groups"]


def test_tied_weights_save_and_load(tmp_path):
    weight = torch.randn(3, 3)
    state = {"model.a": weight, "model.b": weight, "scale": weight[0], "model.c": weight.t()}
    checkpoint = {"state_dict": state, "global_step": 1, "epoch": 0}
    plugin = DirectoryCheckpointIO()
    plugin.save_checkpoint(checkpoint, tmp_path / "step-00000001")
    back = plugin.load_checkpoint(tmp_path / "step-00000001")["state_dict"]
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())
    assert checkpoint["state_dict"] is state and checkpoint.keys() == {"state_dict", "global_step", "epoch"}
    plugin.remove_checkpoint(tmp_path / "step-00000001")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_stored_is_refused_while_saving(tmp_path):
    checkpoint = {
        "state_dict": {"model.w": torch.zeros(1)},
        "global_step": 1,
        "epoch": 0,
        "hyper_parameters": {"f": len},
    }
    with pytest.raises(
        TypeError, match=r"the entry 'hyper_parameters\.f' must be a tensor or plain data, got builtins"
    ):
        DirectoryCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-00000001")
    checkpoint = {"state_dict": {"net.w": torch.zeros(1)}, "global_step": 1, "epoch": 0}
    with pytest.raises(ValueError, match=r"the network must be self\.model of the LightningModule, got \['net\.w'\]"):
        DirectoryCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-00000001")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_loaded(tmp_path):
    fit(tmp_path, epochs=1)
    path = tmp_path / "checkpoints" / "last" / "trainer.json"
    path.write_text(path.read_text().replace('"epoch": 0', '"epoch": 1'))
    with pytest.raises(ValueError, match=r"checksum mismatch in .*trainer\.json"):
        DirectoryCheckpointIO().load_checkpoint(path.parent)


def test_saves_every_n_optimizer_steps_and_keeps_the_newest(tmp_path):
    saved = []

    class Note(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append(trainer.global_step)

    fit(tmp_path, every=3, callbacks=(Note(),))
    assert saved == [3, 6, 8, 8, 9, 12, 15, 16, 16]  # at 8 and 16 before and after the validation
    assert steps(tmp_path)[-2:] == [15, 16] and target(tmp_path, "last") == "step-00000016"
    saved.clear()
    fit(tmp_path / "accumulated", every=3, accumulate_grad_batches=2, callbacks=(Note(),))
    assert saved == [3, 4, 4, 6, 8, 8]
    saved.clear()
    fit(tmp_path / "ends", every=0, max_steps=5, callbacks=(Note(),), limit_val_batches=0)
    assert saved == [5]


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("max", (0.125, 0.75, 0.25, 0.75), 16),
        ("min", (0.5, 0.5, 0.75, 1.0), 8),
        ("max", (float("nan"), 0.125, float("nan"), 0.0), 16),
    ],
)
def test_the_best_and_the_last_stay(tmp_path, mode, scores, best):
    """Of equal scores the earlier is the best; NaN never is. Each run of two epochs is resumed once."""
    for part in (0, 2):
        saver = Checkpoints(every_n_steps=2, monitor="score", mode=mode, keep=1)
        fit(tmp_path, epochs=part + 2, checkpoints=saver, resume="auto", callbacks=(Scores(*scores[part : part + 2]),))
    assert target(tmp_path, "best") == f"step-{best:08d}" and target(tmp_path, "last") == "step-00000032"
    assert steps(tmp_path) == [best, 30, 32]
    assert saver.best_score == scores[best // 8 - 1]


def test_keep_and_monitor_can_be_off(tmp_path):
    fit(tmp_path, checkpoints=Checkpoints(every_n_steps=2, monitor=None, keep=0))
    assert steps(tmp_path) == [16] and not (tmp_path / "checkpoints" / "best").exists()


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be logged in validation, got 'val/f1'; logged are: .*val/top1"):
        fit(tmp_path, checkpoints=Checkpoints(monitor="val/f1"))


class FullDisk:
    """Fails the saves with the given numbers, counted from 1."""

    def __init__(self, monkeypatch, *failing):
        self.count, self.failing = 0, failing
        real = DirectoryCheckpointIO.save_checkpoint

        def save(plugin, checkpoint, path, storage_options=None):
            self.count += 1
            if self.count in failing:
                raise OSError(28, "No space left on device")
            real(plugin, checkpoint, path, storage_options)

        monkeypatch.setattr(DirectoryCheckpointIO, "save_checkpoint", save)


def test_training_goes_on_when_the_storage_fails_now_and_then(tmp_path, monkeypatch, caplog):
    expected = fingerprint(*fit(tmp_path / "whole"))
    FullDisk(monkeypatch, 2, 3, 5, 9)
    found = fingerprint(*fit(tmp_path / "full"))
    folder = tmp_path / "full" / "checkpoints"
    assert torch.equal(found["model.0.weight"], expected["model.0.weight"])
    assert caplog.text.count("could not be saved in") == 4
    assert f"step 6 could not be saved in {folder} (No space left on device, " in caplog.text
    assert "bytes free" in caplog.text and "older checkpoints stay and training goes on" in caplog.text
    assert target(tmp_path / "full", "last") == "step-00000016"
    assert target(tmp_path / "full", "best") != "step-00000016"  # its last save, with the metric, failed


def test_the_third_failure_in_a_row_ends_the_run(tmp_path, monkeypatch):
    FullDisk(monkeypatch, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"step 8 could not be saved .*3 saves in a row failed: free space or mend"):
        fit(tmp_path)
    assert steps(tmp_path) == [3] and target(tmp_path, "last") == "step-00000003"


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("models.checkpoints.format.write.os.rename", denied)
    with pytest.raises(
        ValueError, match=r"must be writable, got .*checkpoints with Permission denied and \d+ bytes free"
    ):
        fit(tmp_path)


def test_newer_steps_of_another_run_are_never_mixed_in(tmp_path):
    fit(tmp_path)
    with pytest.raises(ValueError, match=r"steps newer than the one training starts from, 0, got step-00000016; use"):
        fit(tmp_path)
    with pytest.raises(ValueError, match=r"starts from, 15, got step-00000016; use resume=auto"):
        fit(tmp_path, resume=str(tmp_path / "checkpoints" / "step-00000015"))
    assert steps(tmp_path)[-1] == 16


def test_a_smoke_run_writes_nothing(tmp_path):
    fit(tmp_path, fast_dev_run=2)
    assert not (tmp_path / "checkpoints").exists()


def test_lightning_has_nothing_to_warn_about_its_checkpoints(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, max_steps=1)
    assert [str(w.message) for w in caught if "checkpoint" in str(w.message).lower()] == []
    assert json.loads((tmp_path / "checkpoints" / "last" / "trainer.json").read_text())["global_step"] == 1


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"mode": "best"}, "mode must be 'max' or 'min', got 'best'"),
        ({"every_n_steps": -1}, "every_n_steps must be an integer of at least 0, got -1"),
        ({"keep": 1.5}, "keep must be an integer of at least 0, got 1.5"),
    ],
)
def test_arguments_are_checked(keywords, match):
    with pytest.raises(ValueError, match=f"Checkpoints: {match}"):
        Checkpoints(**keywords)
