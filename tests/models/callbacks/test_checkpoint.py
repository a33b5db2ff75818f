"""Checkpoints hold what Lightning gives, are written when they should be, and survive trouble with the storage."""

import json
import shutil
import warnings

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from conf.errors import StorageFailed
from models.callbacks.checkpoint import Checkpoints
from models.callbacks.directory_io import DirectoryCheckpointIO
from models.callbacks.preemption import Stopped
from models.callbacks.retention import Retention
from models.callbacks.saving import free_bytes
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
    empty = {"loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    checkpoint = {"state_dict": state, "global_step": 1, "epoch": 0} | empty
    plugin = DirectoryCheckpointIO()
    plugin.save_checkpoint(checkpoint, tmp_path / "step-00000001")
    back = plugin.load_checkpoint(tmp_path / "step-00000001")["state_dict"]
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())
    assert checkpoint["state_dict"] is state and checkpoint.keys() == {"state_dict", "global_step", "epoch", *empty}
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


def test_the_best_few_and_every_so_many_steps_stay(tmp_path):
    """Validations at 8, 16, 24 and 32; the second-best is overtaken, and its checkpoint goes."""
    for part in (0, 2):
        saver = Checkpoints(every_n_steps=2, monitor="score", keep=1, top_k=2, keep_every_n_steps=5)
        scores = Scores(*(0.5, 0.75, 0.25, 0.75)[part : part + 2])
        fit(tmp_path, epochs=part + 2, checkpoints=saver, resume="auto", callbacks=(scores,))
    assert target(tmp_path, "best") == "step-00000016" and target(tmp_path, "last") == "step-00000032"
    assert steps(tmp_path) == [5, 10, 15, 16, 20, 25, 28, 30, 32]


def test_of_an_older_version_only_the_best_is_known(tmp_path):
    fit(tmp_path, checkpoints=Checkpoints(monitor="score", top_k=2), callbacks=(Scores(0.5, 0.25),))
    saver = Checkpoints(monitor="score", top_k=2)
    saver.load_state_dict({"best_score": 0.5, "best_step": 8, "validation_due": False})
    assert saver.best_score == 0.5 and saver.kept.ranked == ((0.5, 8),)
    saver.load_state_dict({"best_score": float("nan"), "best_step": -1, "validation_due": False})
    assert saver.best_score is None


def test_a_save_is_due_by_the_clock(tmp_path, monkeypatch):
    class Clock(Callback):
        """A minute for each step."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            Clock.now += 60.0

    Clock.now = 0.0
    monkeypatch.setattr("models.callbacks.pace.time.monotonic", lambda: Clock.now)
    fit(tmp_path, checkpoints=Checkpoints(every_n_steps=0, every_minutes=3, keep=99), callbacks=(Clock(),))
    assert steps(tmp_path) == [3, 6, 8, 11, 14, 16]


def test_a_damaged_checkpoint_of_an_earlier_start_is_never_deleted(tmp_path, caplog):
    fit(tmp_path, every=2, epochs=1, checkpoints=Checkpoints(every_n_steps=2, keep=9))
    for step in (4, 6):
        with (tmp_path / "checkpoints" / f"step-{step:08d}" / "trainer.json").open("a") as file:
            file.write(" ")
    fit(tmp_path, epochs=2, resume="auto", checkpoints=Checkpoints(every_n_steps=2, monitor=None, keep=1))
    assert steps(tmp_path) == [4, 6, 8, 14, 16]  # 8 is the best
    assert caplog.text.count("a damaged one stays until you delete it") == 2


def test_storage_that_cannot_be_asked_fails_no_save(tmp_path, monkeypatch, caplog):
    """An old checkpoint of somebody else that cannot be looked at stays; what is free may be unknown."""

    def refuses(*_):
        raise PermissionError(13, "Permission denied")

    old = tmp_path / "step-00000001"
    old.mkdir()
    monkeypatch.setattr("models.callbacks.retention.verify", refuses)
    Retention(keep=0).delete(tmp_path, tmp_path / "step-00000002")
    assert old.exists() and "a damaged one stays until you delete it: [Errno 13]" in caplog.text
    monkeypatch.setattr("shutil.disk_usage", refuses)
    assert free_bytes(tmp_path / "not/yet") == "unknown"


@pytest.mark.case(2)
@pytest.mark.parametrize("epochs", [2, 3])
def test_pointers_that_a_killed_run_did_not_move_are_moved_by_the_next(tmp_path, epochs):
    """Also where the run was over."""
    fit(tmp_path, checkpoints=Checkpoints(every_n_steps=2, monitor="score", keep=9), callbacks=(Scores(0.25, 0.5),))
    for name, step in (("last", 14), ("best", 8)):
        (tmp_path / "checkpoints" / name).unlink()
        (tmp_path / "checkpoints" / name).symlink_to(f"step-{step:08d}")
    saver = Checkpoints(every_n_steps=0, monitor="score", keep=9)
    fit(tmp_path, resume="auto", epochs=epochs, checkpoints=saver, callbacks=(Scores(0.375),), limit_train_batches=8)
    assert target(tmp_path, "best") == "step-00000016" and target(tmp_path, "last") == f"step-{8 * epochs:08d}"


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
    for name in ("last", "best"):  # the last save, with the metric, failed and was tried again at the end
        assert target(tmp_path / "full", name) == target(tmp_path / "whole", name)
    assert found["best"] == expected["best"]


def test_the_third_failure_in_a_row_ends_the_run(tmp_path, monkeypatch):
    FullDisk(monkeypatch, 2, 3, 4)
    with pytest.raises(
        StorageFailed, match=r"step 8 could not be saved .*3 saves in a row failed: free .*go.* on from"
    ):
        fit(tmp_path)
    assert steps(tmp_path) == [3] and target(tmp_path, "last") == "step-00000003"


def test_the_best_of_a_folder_is_no_other_runs(tmp_path):
    """Of the same step, and of other files."""
    saver = Checkpoints(every_n_steps=3)
    fit(tmp_path / "a", checkpoints=saver)
    one, other, step = tmp_path / "a/checkpoints", tmp_path / "b/checkpoints", saver.kept.best.step
    shutil.copytree(one, other, symlinks=True)
    assert saver.kept.found(one, one) == saver.kept.found(other, one) == {step}
    path = other / f"step-{step:08d}/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["trainer.json"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert saver.kept.found(other, one) == set() and saver.kept.found(other, other) == {step}


@pytest.mark.case(17)
def test_a_run_never_ends_well_without_its_last_step(tmp_path, monkeypatch):
    """Of nine saves the last one fails, and so does the second try at the end."""
    FullDisk(monkeypatch, 9, 10)
    with pytest.raises(StorageFailed, match=r"step 16 could not be saved .*the run ends without it: free space") as end:
        fit(tmp_path)
    assert end.value.status == 74 and target(tmp_path, "last") == "step-00000016"  # from before the validation
    task, _ = fit(tmp_path, resume="auto")
    assert task.seen == [] and task.validations == [16]


@pytest.mark.case(17)
@pytest.mark.parametrize(("failing", "step"), [((1,), 1), ((1, 2, 3, 4), 3)])
def test_a_stop_whose_step_cannot_be_saved_says_that_it_is_lost(tmp_path, monkeypatch, failing, step):
    """75 would say that nothing is; whether it is the first failure or the third, which is tried once more."""
    FullDisk(monkeypatch, *failing)
    with pytest.raises(
        Stopped, match=rf"stopped by SIGTERM at step {step}, which is lost: .*step {step} could not be"
    ) as end:
        fit(tmp_path, signals={f"0.{step - 1}": "SIGTERM"}, every=1 if step > 1 else 0)
    assert end.value.status == 74 and "the run ends without it: free space" in str(end.value)
    assert steps(tmp_path) == []


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
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"keep_every_n_steps": 0}, "keep_every_n_steps must be an integer of at least 1, got 0"),
        ({"every_minutes": 0}, "every_minutes must be a number above 0 or null, got 0"),
        ({"mode": "best"}, "mode must be 'max' or 'min', got 'best'"),
        ({"every_n_steps": -1}, "every_n_steps must be an integer of at least 0, got -1"),
        ({"keep": 1.5}, "keep must be an integer of at least 0, got 1.5"),
    ],
)
def test_arguments_are_checked(keywords, match):
    with pytest.raises(ValueError, match=f"Checkpoints: {match}"):
        Checkpoints(**keywords)
