"""`python train.py` and `python eval.py` as a user meets them."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.tasks.classification import Classification

ROOT = Path(__file__).parents[1]
SMALL = (
    "logger=none",
    "data.batch_size=16",
    "trainer.limit_train_batches=6",
    "trainer.log_every_n_steps=2",
    "trainer.max_epochs=2",
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / "model.safetensors")


def logged_steps(run: Path) -> list[str]:
    return [row["step"] for row in csv.DictReader((run / "metrics.csv").open())]


def test_a_run_leaves_everything_and_eval_agrees(command, tmp_path):
    status, out, err = command("train", *SMALL, "run.name=mine", "attention=agent")
    assert status == 0, err
    run = tmp_path / "outputs" / "mine"
    assert "coatnet_32px with agent attention on digits" in out and "images/s" in out and "eval.py ckpt=" in out
    for name in ("config.yaml", "metrics.csv", "metrics.json", "curves.png", "checkpoints/best", "checkpoints/last"):
        assert (run / name).exists(), name
    assert not [path for path in run.rglob("*") if path.suffix in (".ckpt", ".pt", ".pth", ".pkl")]
    figures = json.loads((run / "metrics.json").read_text())
    assert {"val/top1", "val/top1_ema", "val/top5", "val/loss", "train/loss", "images_per_second"} <= set(figures)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["val/top1"]] == ["5", "11"] and len(rows) > 4

    status, out, err = command("eval", f"ckpt={run / 'checkpoints' / 'last'}")
    assert status == 0, err
    measured = json.loads((run / "checkpoints" / "metrics.json").read_text())
    for name in ("val/top1", "val/top1_ema", "val/top5", "val/loss"):
        assert measured[name] == pytest.approx(figures[name], abs=1e-5), name
    assert (
        measured["parameters"] == figures["parameters"]
        and measured["flops"] > 1e6
        and measured["images_per_second"] > 0
    )
    assert "top-1" in out and "FLOPs" in out


def test_a_stopped_run_continues_exactly(command, tmp_path, monkeypatch):
    """SIGTERM in the middle of the second epoch, then the same command: the weights of an uninterrupted run."""
    arguments = (*SMALL, "data.workers=0", "model.drop_path=0.2")
    assert command("train", *arguments, "run.name=whole")[0] == 0
    step = Classification.training_step

    def interrupted(task, batch, batch_idx):
        if task.trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(task, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", interrupted)
    status, _, err = command("train", *arguments, "run.name=parts")
    assert status == 75 and "resume=" in err
    monkeypatch.setattr(Classification, "training_step", step)
    status, out, err = command("train", *arguments, "run.name=parts")
    assert status == 0 and "continues from outputs/parts/checkpoints/step-00000009" in out, err
    whole, parts = weights(tmp_path / "outputs" / "whole"), weights(tmp_path / "outputs" / "parts")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    steps = [
        [row["step"] for row in csv.DictReader((tmp_path / "outputs" / n / "metrics.csv").open())]
        for n in ("whole", "parts")
    ]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_the_default_learns_digits(command, tmp_path):
    """The whole default reaches 99 % in 30 epochs; a third of it, here, measured 90.6 %."""
    status, _, err = command("train", "logger=none", "trainer.max_epochs=10", "run.name=learn")
    assert status == 0, err
    assert json.loads((tmp_path / "outputs/learn/metrics.json").read_text())["best/val/top1"] >= 0.85


@pytest.mark.slow
def test_without_a_key_wandb_logs_offline(command, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    small = [setting for setting in SMALL if setting != "logger=none"]
    status, out, err = command("train", *small, "trainer.max_epochs=1", "run.name=offline", "logger=wandb")
    assert status == 0, err
    assert "Weights & Biases is offline; upload with: wandb sync" in out
    assert list((tmp_path / "outputs/offline/wandb").glob("offline-run-*/run-*.wandb"))
    assert (tmp_path / "outputs/offline/metrics.json").exists()


def test_a_loss_that_is_not_finite_ends_the_run(command, tmp_path):
    hopeless = ("optimizer.lr=1e30", "schedule.warmup_epochs=0", "checkpoint.every_n_steps=1", "run.name=hot")
    status, _, _ = command("train", *SMALL, *hopeless)
    assert re.search(
        r"loss is NaN or infinite, got it at step \d+, epoch 0, learning rate .*lower the rate", str(status)
    )
    for weights_file in (tmp_path / "outputs/hot").rglob("model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(weights_file).values())


def test_a_finished_run_says_so(command, tmp_path):
    arguments = (*SMALL, "trainer.max_epochs=1", "run.name=done")
    assert command("train", *arguments)[0] == 0
    before = (tmp_path / "outputs/done/metrics.json").read_text()
    status, out, _ = command("train", *arguments)
    assert status == 0 and "finished" in out and "run.name" in out
    assert (tmp_path / "outputs/done/metrics.json").read_text() == before


def test_another_attention_than_the_checkpoint_is_one_sentence(command):
    assert command("train", *SMALL, "trainer.max_epochs=1", "run.name=x")[0] == 0
    status, _, err = command("train", *SMALL, "run.name=x", "attention=agent")
    assert status == 2 and "softmax_attention" in err and "agent_attention" in err and "run.name" in err


def test_a_sweep_ends_in_one_table(command):
    status, out, err = command(
        "train", "-m", *SMALL, "trainer.max_epochs=1", "attention=softmax,focused_linear", "run.name=s"
    )
    assert status == 0, err
    table = out[out.index("2 of 2 runs") :]
    assert "attention=softmax" in table and "attention=focused_linear" in table and "top-1" in table


def test_a_sweep_goes_on_after_a_wrong_configuration(command):
    one_of_two_fits = ("model=vit_32px", "model.class_token=true", "attention=window,softmax")
    status, out, err = command("train", "-m", *SMALL, "trainer.max_epochs=1", *one_of_two_fits)
    assert status == 2 and "set model.class_token=false" in err
    assert "1 of 2 runs" in out and "no result: " in out


WRONG = {
    "attention=agnt": r"attention: there is no 'agnt'; did you mean 'agent'\?",
    "model=vit_tinny": r"model: there is no 'vit_tinny'; did you mean 'vit_tiny'",
    "data=digit": r"data: there is no 'digit'; did you mean 'digits'\?",
    "modle=vit_tiny": r"there is no setting 'modle'; did you mean 'model'\?",
    "trainer.max_epoch=3": r"no setting 'trainer.max_epoch'; did you mean 'max_epochs'.*\nvalid keys of trainer: ",
    "attention.topk=3": r"no setting 'attention.topk'.*\nvalid keys of attention: ",
    "+model.foo=1": r"unexpected keyword argument 'foo'",
    "optimizer.lr=abc": r"optimizer: lr must be a number of at least 0, got 'abc'",
    "optimizer.opt=adamm": r"optimizer: timm cannot make it .*adamm",
    "schedule.sched=cosin": r"schedule: sched must be one of cosine",
    "task.label_smoothing=1": r"label_smoothing must be in \[0, 1\), got 1",
    "data.batch_size=5000": r"5000",
    "data=imagefolder": r"data.root=",
    "data=imagefolder data.root=/nowhere": r"no folder /nowhere",
    "data=huggingface": r"data.source.path, data.num_classes: no value; give one .*data.num_classes=\.\.\.",
    "trainer.precision=9": r"(?i)precision",
    "run.name=nan": r"run.name: must be a finite number or text, got nan",
    "resume=/nowhere/best": r"nothing at this path, got /nowhere/best",
    "model=vit_32px model.class_token=true attention=biformer": r"stage 0 blocks 0-3 .*set model.class_token=false",
    "model.depths=[1,2": r"quote lists",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_setting_is_one_clear_error(command, tmp_path, arguments):
    status, _, err = command("train", "logger=csv", *arguments.split())
    assert status == 2
    assert re.search(WRONG[arguments], err), err
    assert "Traceback" not in err and "Error executing job" not in err
    assert not list(tmp_path.rglob("metrics.csv")) and not list(tmp_path.rglob("checkpoints"))


def test_eval_names_what_is_wrong(command, tmp_path):
    status, _, err = command("eval")
    assert status == 2 and "ckpt" in err
    status, _, err = command("eval", "ckpt=nowhere/best")
    assert status == 2 and "nothing at this path" in err


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["attention=agnt"]], ids=" ".join)
def test_the_command_line_is_instant(arguments):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True, cwd=ROOT
        )
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 2.0
    assert result.returncode == (2 if "agnt" in arguments[0] else 0)
    if arguments == ["--help"]:
        assert "attention: " in result.stdout and "focused_linear" in result.stdout
