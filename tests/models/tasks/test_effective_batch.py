"""The images of an optimizer step: accumulation makes up what devices lack, and a run says what it does."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from conf import recipes
from conf.errors import UserError
from models.checkpoints import read_config, read_manifest
from models.loggers.metrics_csv import read_metrics
from models.tasks.classification import Classification
from models.tasks.effective_batch import accumulate, check_resumed, describe, go_on
from tests.models.tasks.test_classification import Batch, Data, Net, trainer

ROOT = Path(__file__).parents[3]
SMALL = (
    *("logger=none", "trainer.max_epochs=2", "trainer.limit_train_batches=7", "trainer.limit_val_batches=2"),
    "trainer.log_every_n_steps=1",
)
EXACT = ("model=vit_32px", "data.workers=0", "data.batch_size=16")  # no batch norm: a sum over parts is the whole


def parts(batch=64, processes=1, given=1, images=None, epoch=1000, limit=1.0, recipe=None, lr=1e-3, reference=None):
    """Configuration, trainer and data of a run as far as its batch goes."""
    config = {
        "global_batch": images,
        "trainer": {"accumulate_grad_batches": given},
        "optimizer": {"lr": lr, "reference_batch": reference},
        "run": {"recipe": recipe},
    }
    limits = {"limit_train_batches": limit, "limit_val_batches": 3}
    runs = SimpleNamespace(world_size=processes, accumulate_grad_batches=given, **limits)
    return config, runs, SimpleNamespace(batch_size=batch, steps_per_epoch=lambda world: epoch)


@pytest.mark.parametrize(
    ("settings", "accumulated", "batches"),
    [
        ({"images": None, "given": 3}, 3, 1.0),
        ({"images": 64}, 1, 1.0),
        ({"images": 1024, "batch": 128, "processes": 8}, 1, 1.0),
        ({"images": 1024, "batch": 128, "epoch": 10009}, 8, 10008),
        ({"images": 1024, "batch": 128, "processes": 2, "given": 4, "epoch": 4}, 4, 4),
        ({"images": 128, "limit": 7}, 2, 6),
        ({"images": 128, "limit": 0.5, "epoch": 11}, 2, 4),
    ],
)
def test_accumulation_makes_up_what_the_devices_lack(settings, accumulated, batches):
    config, runs, data = parts(**settings)
    accumulate(config, runs, data)
    assert runs.accumulate_grad_batches == config["trainer"]["accumulate_grad_batches"] == accumulated
    assert runs.limit_train_batches == batches  # of an epoch: whole steps


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"images": "many"}, "global_batch: must be a whole number of at least 1, got 'many'; set global_batch=1024"),
        ({"images": 0}, "global_batch: must be a whole number of at least 1, got 0; set global_batch=1024"),
        (
            {"images": 1024, "batch": 96, "processes": 8},
            "global_batch: 1024 images per step cannot be made of 96 x 8 processes; "
            "set data.batch_size=128 (1024 = 128 x 8) or global_batch=768",
        ),
        (
            {"images": 1024, "batch": 60},
            "global_batch: 1024 images per step cannot be made of 60 x 1 process; "
            "set data.batch_size=64 (1024 = 64 x 16) or global_batch=1020",
        ),
        (
            {"images": 32, "batch": 64},
            "global_batch: 32 images per step cannot be made of 64 x 1 process; "
            "set data.batch_size=32 or global_batch=64",
        ),
        (
            {"images": 1000, "batch": 100, "processes": 3},
            "global_batch: 1000 images per step cannot be made of 100 x 3 processes; set global_batch=900",
        ),
        (
            {"images": 256, "given": 2},
            "global_batch: 256 images per step are 4 batches of 64, got trainer.accumulate_grad_batches=2; "
            "leave one of the two out",
        ),
        (
            {"images": 1024, "limit": 6},
            "global_batch: 1024 images per step are 16 batches, but an epoch has 6; "
            "set global_batch=384 or less, or global_batch=null",
        ),
    ],
)
def test_what_cannot_be_made_is_one_error_with_values_that_fit(settings, text):
    config, runs, data = parts(**settings)
    before = copy.deepcopy((config, vars(runs)))
    with pytest.raises(UserError) as error:
        accumulate(config, runs, data)
    assert str(error.value) == text
    assert (config, vars(runs)) == before


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "batch 64 on 1 process; learning rate 1e-03, as given"),
        ({"processes": 8}, "batch 64 x 8 processes = 512 images per step; learning rate 1e-03, as given"),
        (
            {"batch": 128, "given": 8, "lr": 5e-4, "reference": 512},
            "batch 128 x 1 process x 8 accumulated = 1024 images per step; "
            "learning rate 5e-04 x 1024/512 = 1e-03 (linear rule)",
        ),
        (
            {"batch": 96, "processes": 2, "given": 2, "lr": 5e-4, "reference": 512},
            "batch 96 x 2 processes x 2 accumulated = 384 images per step; "
            "learning rate 5e-04 x 384/512 = 3.75e-04 (linear rule)",
        ),
        ({"lr": 0.1, "reference": 64}, "batch 64 on 1 process; learning rate 1e-01 x 64/64 = 1e-01 (linear rule)"),
        ({"lr": None}, "batch 64 on 1 process; learning rate of the optimizer"),
    ],
)
def test_the_line_reads_well(settings, line):
    assert describe(*parts(**settings)) == line


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe `paper/tiny` that trains with 48 images per step."""
    folder = tmp_path / "recipes" / "paper"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text("global_batch: 48\noptimizer: {lr: 0.002, reference_batch: 96}\n")
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    return "paper/tiny"


def test_another_batch_than_the_recipes_is_said(recipe):
    same, other = (describe(*parts(batch=batch, recipe=recipe)) for batch in (48, 32))
    assert same == "batch 48 on 1 process; learning rate 1e-03, as given"
    assert other == "batch 32 on 1 process; learning rate 1e-03, as given; the recipe trains with 48"


@pytest.mark.full
def test_a_recipe_sets_the_batch_and_the_command_line_wins(command, tmp_path, recipe):
    arguments = (*EXACT, *SMALL, f"recipe={recipe}", "trainer.max_epochs=1")
    status, out, err = command("train", *arguments, "run.name=own")
    assert status == 0, err
    lines = out.splitlines()
    assert re.fullmatch(r"vit_32px with .* on digits: .* M parameters, 10 classes, images of 32 px", lines[0])
    assert lines[1] == (
        "batch 16 x 1 process x 3 accumulated = 48 images per step; learning rate 2e-03 x 48/96 = 1e-03 (linear rule)"
    )
    config = OmegaConf.load(tmp_path / "outputs/own/config.yaml")
    assert config.run.recipe == recipe and config.global_batch == 48 and config.trainer.accumulate_grad_batches == 3
    assert read_config(tmp_path / "outputs/own/checkpoints/last") == OmegaConf.to_container(config)
    status, out, err = command("train", *arguments, "run.name=other", "global_batch=32")
    assert status == 0, err
    assert out.splitlines()[1].endswith("x 32/96 = 6.667e-04 (linear rule); the recipe trains with 48")
    status, out, err = command("eval", f"ckpt={tmp_path / 'outputs/own/checkpoints/best'}")
    assert status == 0, err
    status, out, err = command("train", "-m", *arguments, "seed=1,2")
    assert status == 0 and "2 of 2 runs" in out, err


def test_a_run_that_cannot_make_the_batch_starts_nothing(command, tmp_path):
    status, _, err = command("train", *EXACT, *SMALL, "global_batch=40", "run.name=x")
    assert status == 2 and "40 images per step cannot be made of 16 x 1 process; set data.batch_size=20" in err
    assert not (tmp_path / "outputs/x/config.yaml").exists()


@pytest.mark.full  # `make test` has the same of a smaller model in callbacks/test_resume.py
def test_an_accumulated_run_stops_anywhere_and_goes_on_exactly(command, tmp_path, monkeypatch):
    """Seven batches of an epoch are three steps of two; the seventh is in none. SIGTERM within a step of epoch 1."""
    arguments = (*EXACT, *SMALL, "global_batch=32", "optimizer.reference_batch=64", "checkpoint.every_n_steps=4")
    status, out, err = command("train", *arguments, "run.name=whole")
    assert status == 0, err
    assert "batch 16 x 1 process x 2 accumulated = 32 images per step" in out
    run = tmp_path / "outputs" / "whole"
    figures = json.loads((run / "metrics.json").read_text())
    assert (figures["steps"], figures["epochs"]) == (6, 2)
    rows = [row for row in read_metrics(run / "metrics.csv") if "lr" in row]
    assert sorted({int(row["step"]) for row in rows}) == list(range(6))
    assert float(rows[-1]["lr"]) < float(rows[3]["lr"]) <= 1e-3 * 32 / 64
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert steps[-1] == "step-00000006" and read_manifest(run / "checkpoints" / "last")["step"] == 6
    step = Classification.training_step

    def interrupted(task, batch, batch_idx):
        if (batch.epoch, batch.number) == (1, 2):  # the first half of the fifth step
            os.kill(os.getpid(), signal.SIGTERM)
        return step(task, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", interrupted)
    assert command("train", *arguments, "run.name=parts")[0] == 75
    assert read_manifest(tmp_path / "outputs/parts/checkpoints/last")["step"] == 5
    monkeypatch.setattr(Classification, "training_step", step)
    status, _, err = command("train", *arguments, "run.name=parts")
    assert status == 0, err
    for name in ("model", "ema"):
        whole, parted = (
            load_file(tmp_path / "outputs" / run / "checkpoints" / "last" / f"{name}.safetensors")
            for run in ("whole", "parts")
        )
        assert [key for key in whole if not torch.equal(whole[key], parted[key])] == []
    status, _, err = command("train", *arguments, "run.name=parts", "global_batch=48", "trainer.max_epochs=4")
    assert status == 2 and "trained with 32 images per optimizer step, got global_batch=48; leave" in err


def test_a_run_goes_on_with_the_same_steps_only():
    runs = parts(given=4)[1]
    check_resumed({"trainer": {"accumulate_grad_batches": 4}}, runs)
    check_resumed({}, parts()[1])
    with pytest.raises(
        UserError, match=r"resume: the checkpoint was trained with 8 batches accumulated .* got 4; give"
    ):
        check_resumed({"trainer": {"accumulate_grad_batches": 8}}, runs)


@pytest.mark.case(25)
@pytest.mark.parametrize(
    ("begun", "settings", "goes_on"),
    [
        ((64, 4, 1, 100), {"processes": 2}, (64, 2, 2, 200)),
        ((64, 4, 1, 100), {"processes": 1}, (64, 1, 4, 400)),
        ((64, 4, 1, 100), {"processes": 8}, (32, 8, 1, 100)),  # smaller batches, for there are more processes
        ((64, 8, 1, 100), {"processes": 4, "images": 512}, (64, 4, 2, 200)),
        ((64, 1, 2, 100), {"processes": 1, "batch": 32}, (32, 1, 4, 200)),
        ((64, 1, 2, 100), {"processes": 1, "given": 2}, None),
        ((64, 1, 1, 100), {"processes": 1}, None),
    ],
)
def test_steps_are_made_up_on_any_number_of_processes(begun, settings, goes_on):
    config, runs, data = parts(**settings)
    config["data"] = {"batch_size": data.batch_size}
    dealt = []
    data.go_on_with = lambda *layout: dealt.append(layout)
    saved = {"data": {"batch_size": begun[0]}, "trainer": {"accumulate_grad_batches": begun[2]}}
    notes = go_on(config, saved, {"begun": list(begun)}, runs, data)
    if goes_on is None:
        assert (notes, dealt, runs.accumulate_grad_batches) == ([], [], begun[2])
        return
    batch, processes, accumulated, batches = goes_on
    assert dealt == [(begun, batch, accumulated)] and runs.limit_train_batches == batches
    assert config["data"]["batch_size"] == batch and runs.accumulate_grad_batches == accumulated
    assert runs.limit_val_batches * batch * processes == 3 * begun[0] * begun[1]
    assert f"goes on as {batch} x {processes} x {accumulated}: the same images in every step" in notes[0]


@pytest.mark.case(25)
def test_an_older_checkpoint_says_what_its_steps_were():
    config, runs, data = parts(batch=32, processes=2)
    config["data"] = {"batch_size": 32}
    data.go_on_with, data.batches_of = lambda *layout: None, lambda batch, processes, accumulated: 101
    saved = {"data": {"batch_size": 64}, "trainer": {"accumulate_grad_batches": 2}, "global_batch": 128}
    notes = go_on(config, saved, {"global_batch": 64, "epoch": 3, "batch": 4}, runs, data)
    assert runs.limit_train_batches == 100 and "began as 64 x 1 x 2" in notes[0] and "goes on as 32 x 2 x 2" in notes[0]
    unknown, runs, data = parts(given=2)
    with pytest.raises(UserError, match="trained with 8 batches accumulated"):
        go_on(unknown, {"trainer": {"accumulate_grad_batches": 8}}, {}, runs, data)


@pytest.mark.case(25)
@pytest.mark.parametrize(
    ("begun", "settings", "text"),
    [
        ((64, 4, 1, 100), {"processes": 3}, "which batches of 64 on 3 processes cannot make; take 2 processes"),
        ((64, 4, 1, 100), {"batch": 96}, "which batches of 96 on 1 process cannot make; take data.batch_size=128"),
        ((64, 1, 1, 100), {"images": 128}, "trained with 64 images per optimizer step, got global_batch=128; leave"),
        ((64, 1, 1, 100), {"given": 2}, "got 64 x 1 x 2 = 128; leave"),
        ((64, 1, 4, 102), {"processes": 4}, "ends with a shorter step of 2 batches on 1 processes, which 64 x 4 x 1"),
    ],
)
def test_steps_that_cannot_be_made_are_refused(begun, settings, text):
    config, runs, data = parts(**settings)
    config["data"] = {"batch_size": data.batch_size}
    saved = {"data": {"batch_size": begun[0]}, "trainer": {"accumulate_grad_batches": begun[2]}}
    with pytest.raises(UserError, match="resume: ") as error:
        go_on(config, saved, {"begun": list(begun)}, runs, data)
    assert text in str(error.value)


class Parts(Data):
    """The same 24 images in batches of any size."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(24, 3, 2, 2, generator=generator)

    def train_dataloader(self):
        def collate(numbers):
            return Batch(self.images[numbers], torch.tensor(numbers) % 4)

        return DataLoader(list(range(24)), batch_size=self.batch_size, collate_fn=collate)


def test_the_gradient_of_the_parts_is_that_of_the_whole():
    found = []
    for batch, accumulated in [(12, 1), (4, 3), (2, 6)]:
        torch.manual_seed(0)
        settings = {"sched": "constant", "warmup_epochs": 0}
        weightless = {"balance": {"weight": 0.0, "reduction": "sum"}}
        optimizer = {"opt": "sgd", "lr": 0.1, "reference_batch": 24, "weight_decay": 0.01}
        module = Classification(Net(), optimizer, settings, 4, auxiliary=weightless)
        fit = trainer(max_epochs=2, accumulate_grad_batches=accumulated, limit_val_batches=0)
        fit.fit(module, Parts(batch))
        assert fit.global_step == 4
        found.append(module.model.fc.weight.detach())
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)  # sums in another order
    torch.testing.assert_close(found[2], found[0], atol=1e-6, rtol=1e-5)


@pytest.mark.full
@pytest.mark.slow
def test_processes_and_accumulation_make_the_same_steps(command, tmp_path):
    """64 images as four batches of one process, and as two batches of each of two processes: the same weights."""
    exact = ("global_batch=64", "optimizer=sgd", "optimizer.lr=0.01", "model.drop_path=0", "trainer.max_steps=3")
    arguments = (*EXACT, *SMALL, *exact, "trainer.limit_train_batches=1.0", "trainer.accelerator=cpu")
    status, out, err = command("train", *arguments, "run.name=one")
    assert status == 0, err
    ddp = ("trainer.devices=2", "trainer.strategy=ddp", "run.name=two")
    call = [sys.executable, ROOT / "train.py", *arguments, *ddp]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    weights = {}
    for name, shared, output in [("one", "1 process x 4", out), ("two", "2 processes x 2", done.stdout)]:
        assert f"batch 16 x {shared} accumulated = 64 images per step" in output
        assert json.loads((tmp_path / "outputs" / name / "metrics.json").read_text())["steps"] == 3
        weights[name] = load_file(tmp_path / "outputs" / name / "checkpoints/last/model.safetensors")
    for key, value in weights["one"].items():  # sums in another order
        torch.testing.assert_close(weights["two"][key], value, atol=1e-6, rtol=1e-4, msg=key)
