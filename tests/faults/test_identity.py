"""A continued run is the same run: what changes the result is refused in one sentence, and nothing is started over."""

import copy
import fcntl
import json

import pytest

from conf import leftovers
from conf.errors import UserError
from data.module import ImageData
from data.sources.fake import Fake
from models.runs.identity import compare_configs, compare_data
from models.runs.preflight import lock_folder
from models.runs.resume import begins_again, find_resume

EMA = {"_target_": "models.callbacks.ema.EMA", "decay": 0.9998, "warmup": True}
SAVED = {
    "attention": {"_target_": "models.attention.softmax.softmax_attention", "backend": "auto"},
    "model": {"_target_": "models.backbones.vit.ViT", "dim": 48, "pool": None, "gate": None},
    "data": {"root": "/a", "workers": 0, "source": {"train": "a.csv", "root": "/a"}, "eval": {"resize": None}},
    "trainer": {"precision": "32-true", "max_epochs": 2, "limit_train_batches": 1.0, "gradient_clip_val": None},
    "callbacks": {"ema": EMA, "routing": {"_target_": "models.callbacks.routing.Routing"}, "preemption": {"x": 1}},
    "checkpoint": {"every_n_steps": 5, "keep": 1, "monitor": "val/top1", "mode": "max"},
    "gate": None,
    "pool": None,
    "seed": 0,
    "freeze": None,
    "logger": {"name": "csv"},
}


def changed(**settings):
    """SAVED with other settings, by their keys with two underscores for a dot."""
    config = copy.deepcopy(SAVED)
    for key, value in settings.items():
        *place, name = key.split("__")
        node = config
        for part in place:
            node = node[part]
        node[name] = value
    return config


@pytest.mark.case(24)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"callbacks__ema__decay": 0.5}, "callbacks.ema.decay 0.9998 and not 0.5 as this"),
        ({"callbacks__ema": None}, "callbacks.ema EMA and not None as this"),
        ({"callbacks__routing": None}, "callbacks.routing Routing and not None as this"),
        ({"callbacks": None}, "callbacks.ema EMA and not None, callbacks.routing Routing and not None as this"),
        ({"trainer__precision": "bf16-mixed"}, "trainer.precision 32-true and not bf16-mixed as this"),
        ({"trainer__gradient_clip_val": 1.0}, "trainer.gradient_clip_val None and not 1.0 as this"),
        ({"trainer__limit_train_batches": 1}, "trainer.limit_train_batches 1.0 and not 1 as this"),
        (
            {"checkpoint__monitor": "val/loss", "checkpoint__mode": "min"},
            "checkpoint.monitor val/top1 and not val/loss",
        ),
        ({"seed": 1, "model__dim": 64}, "model.dim 48 and not 64, seed 0 and not 1 as this"),
        ({"freeze": ["stem"]}, r"freeze None and not \['stem'\] as this|freeze None and not stem as this"),
        ({"data__source__train": "b.csv"}, "data.source.train a.csv and not b.csv as this"),
        ({"data__eval__resize": 40}, "data.eval.resize None and not 40 as this"),
        ({"model__gate": {"_target_": "models.gates.eca.eca"}}, "model.gate None and not eca as this"),
    ],
    ids=str,
)
def test_what_changes_the_result_is_refused(change, text):
    with pytest.raises(UserError, match=f"resume: the checkpoint was trained with .*{text}"):
        compare_configs(SAVED, changed(**change))
    with pytest.raises(UserError, match="resume: the checkpoint was trained with"):
        compare_configs(changed(**change), SAVED)


@pytest.mark.case(24)
def test_what_may_be_otherwise():
    for change in (
        {"data__root": "/b", "data__source__root": "/b", "data__workers": 9},
        {"trainer__max_epochs": 9, "trainer__precision": 32},
        {"checkpoint__every_n_steps": 1, "checkpoint__keep": 9},
        {"logger": {"name": "wandb"}, "callbacks__preemption": None},
        {"attention__backend": "torch"},
    ):
        compare_configs(SAVED, changed(**change))
    compare_configs(SAVED, changed(data__source__train="/moved/a.csv"), fingerprinted=True)


@pytest.mark.case(24)
def test_what_an_older_checkpoint_does_not_know_is_no_difference():
    """A key that came later has its usual value, or somebody has given it another."""
    older = copy.deepcopy(SAVED)
    del older["callbacks"]["ema"]["warmup"], older["freeze"], older["checkpoint"]["mode"]
    compare_configs(older, SAVED, usual=lambda key: key in ("callbacks.ema.warmup", "checkpoint.mode"))
    with pytest.raises(UserError, match=r"callbacks\.ema\.warmup None and not True"):
        compare_configs(older, SAVED, usual=lambda key: key == "checkpoint.mode")


@pytest.mark.case(24)
def test_of_an_older_checkpoint_the_names_of_classes_are_compared(tmp_path):
    data = ImageData(Fake(3), 3, 8, 4)
    compare_data({"classes": data.class_names}, {}, data, tmp_path)
    compare_data({}, {"data": data.fingerprint}, data, tmp_path)
    with pytest.raises(
        UserError, match=r"resume: the data is not that of .* class 'ant' is gone; .* label 0 was 'ant'"
    ):
        compare_data({"classes": ["ant", *data.class_names[1:]]}, {}, data, tmp_path)


@pytest.mark.case(16)
def test_there_must_be_something_to_continue(tmp_path):
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"resume: must goes on .* no checkpoint in .*mien/checkpoints; .*'mine'"):
        find_resume("must", tmp_path / "mien")
    assert find_resume("auto", tmp_path / "mien") is None
    assert begins_again(tmp_path / "mine") == []
    (tmp_path / "mine" / "train.log").touch()
    assert "begins at step 0" in begins_again(tmp_path / "mine")[0]


@pytest.mark.case(14)
def test_the_folder_of_a_run_that_is_just_beginning_is_left_alone(tmp_path):
    """A command that is refused there removes what it has made itself, and no empty folder of the other one."""
    run = tmp_path / "run"
    run.mkdir()
    leftovers._note(run, sweep=False)
    (run / "checkpoints").mkdir()
    with (run / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        leftovers.remove()
        assert (run / "checkpoints").is_dir()
        fcntl.flock(lock, fcntl.LOCK_UN)
    leftovers._note(run, sweep=False)
    leftovers._noted[-1] = leftovers._noted[-1]._replace(inside=frozenset({".lock"}))
    leftovers.remove()
    assert not (run / "checkpoints").exists() and run.is_dir()


@pytest.mark.case(19)
def test_a_folder_that_takes_no_files_is_one_sentence(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"run: .* cannot be written: Is a directory; give another run\.name"):
        lock_folder(tmp_path)


SMALL = (
    *("model=vit_32px", "model.dim=16", "model.depth=1", "model.num_heads=2", "model.patch_size=16", "logger=none"),
    *(
        "data=fake",
        "data.num_classes=4",
        "data.source.train_images=32",
        "data.source.val_images=8",
        "trainer.devices=1",
    ),
    *("data.batch_size=8", "trainer.accelerator=cpu", "trainer.max_epochs=1", "callbacks.routing=null"),
)


def contents(folder):
    """Every file below a folder with what it holds; a lock may say who has tried it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.full
@pytest.mark.case(14)
@pytest.mark.case(16)
@pytest.mark.case(24)
def test_commands_that_ask_for_something_else(command, tmp_path):
    status, _, err = command("train", *SMALL, "run.name=must", "resume=must")
    assert status == 2 and "resume: must goes on with a run, got no checkpoint" in err, err
    assert not (tmp_path / "outputs/must").exists()
    assert command("train", *SMALL, "run.name=a")[0] == 0
    last = tmp_path / "outputs/a/checkpoints/last"
    more = ("run.name=a", "trainer.max_epochs=2")
    before = contents(tmp_path / "outputs")
    status, _, err = command("train", *SMALL, *more, "callbacks.ema=null", "checkpoint.monitor=val/loss")
    assert status == 2 and "callbacks.ema EMA and not None, checkpoint.monitor val/top1 and not val/loss" in err, err
    with (tmp_path / "outputs/a/.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, busy = command("train", *SMALL, *more, "optimizer.lr=9e-3")
    assert status == 2 and "outputs/a is in use by" in busy and "Traceback" not in err + busy
    assert contents(tmp_path / "outputs") == before
    config = json.loads((last / "config.json").read_text())
    del config["callbacks"]["ema"]["warmup"], config["data"]["balanced"]  # as an older version would have left it
    manifest = json.loads((last / "manifest.json").read_text())
    (last / "config.json").write_text(json.dumps(config))
    from models.checkpoints.format.directory import file_entry

    manifest["files"]["config.json"] = file_entry(last / "config.json")
    (last / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = command("train", *SMALL, *more, "callbacks.ema.warmup=false")
    assert status == 2 and "callbacks.ema.warmup None and not False" in err, err
    status, out, err = command("train", *SMALL, *more, "resume=must")
    assert status == 0 and "continues from" in out, err
