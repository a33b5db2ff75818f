"""Killed (−9) at random moments and started again: the run ends with the bits of one that was never killed.

An experiment is a setting, an uninterrupted run of it, and a run whose whole process group is killed up to three times;
each time the same command goes on. What is compared: files of weights, optimizer and averages, what `best` is, the
figures of metrics.json and the steps of metrics.csv.
"""

import csv
import json
import random
import time
from functools import cache
from pathlib import Path

import pytest

from tests.faults.programs import TINY, digests, run, start

SAVE = "checkpoint.every_n_steps=3"
FOLDER = ("data=imagefolder", "data.root=images", "data.batch_size=8", "data.num_classes=2")
MODEL = TINY[:5]
TRAINER = ("trainer.accelerator=cpu", "trainer.max_epochs=3", "trainer.log_every_n_steps=1", "logger=none")
SETTINGS = {
    "plain": TINY,
    "drop path, DeiT": (*TINY, "model.drop_path=0.2", "augment=deit"),
    "two workers, repeated": (*MODEL, *FOLDER, *TRAINER, "data.workers=2", "augment=deit", "augment.repeated=3"),
    "two workers, last batch kept": (*MODEL, *FOLDER, *TRAINER, "data.workers=2", "data.drop_last=false"),
    "two workers, skip": (*MODEL, *FOLDER, *TRAINER, "data.workers=2", "data.on_error=skip"),
    "global batch": (*TINY, "data.batch_size=8", "global_batch=32"),
    "accumulated": (*TINY, "trainer.accumulate_grad_batches=3"),
    "MoH": (*TINY, "attention=moh"),
    "BiFormer": ("model=biformer_32px", *TINY[5:]),
    "dual, recomputed": (*TINY, "attention=dual", "task.gradient_checkpointing=true"),
    "agent": (*TINY, "attention=agent"),
    "no average": (*TINY, "callbacks.ema=null"),
    "SGD, clipped": (*TINY, "optimizer=sgd", "trainer.gradient_clip_val=1.0"),
    "a validation every two epochs": (*TINY, "trainer.check_val_every_n_epoch=2"),
    "bf16": (*TINY, "trainer.precision=bf16-mixed"),
    "steps": (*TINY, "trainer.max_epochs=-1", "trainer.max_steps=21"),
    "generation": (
        *("model=dit_s_2", "task=generation", "data=digits", "model.depth=1", "model.dim=32", "model.num_heads=2"),
        *("trainer.limit_train_batches=8", "trainer.limit_val_batches=2", "data.batch_size=16", *TRAINER),
        "task.sample_every_n_epochs=2",
    ),
    "LoRA": (*TINY, "adapter=lora"),
    "balanced": (*TINY, "data.balanced=true"),
    "two processes": (*TINY, "trainer=ddp_cpu", "trainer.max_epochs=3", "trainer.devices=2", "data.batch_size=8"),
    "shares": (*TINY, "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=8"),
}


@cache
def images(folder: Path) -> None:
    """Two classes of noise on disk."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for name in ("ant", "bee"):
            place = folder / "images" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                Image.fromarray(noise.integers(0, 256, (40, 36, 3), np.uint8)).save(place / f"{index}.png")


def outcome(folder: Path) -> dict[str, object]:
    """What must be the same."""
    timed = ("images_per_second", "data_wait", "seconds", "peak_memory")
    figures = json.loads((folder / "metrics.json").read_text())
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    validated = [(row["step"], row["epoch"], row["val/loss"]) for row in rows if row.get("val/loss")]
    return {
        "files": digests(folder),
        "best": (folder / "checkpoints" / "best").resolve().name if (folder / "checkpoints/best").exists() else None,
        "figures": {name: value for name, value in figures.items() if name not in timed},
        "validations": validated,
        "losses": [(row["step"], row["train/loss"]) for row in rows if row.get("train/loss")],
    }


REFERENCES: dict[str, tuple[dict[str, object], float]] = {}


def reference(name: str, folder: Path) -> tuple[dict[str, object], float]:
    """What a run ends with that nobody disturbs, and its seconds; once for all experiments of a setting."""
    if name not in REFERENCES:
        images(folder)
        began = time.monotonic()
        status, text = run(folder, "run.name=whole", *SETTINGS[name], SAVE)
        assert status == 0, text
        REFERENCES[name] = outcome(folder / "outputs" / "whole"), time.monotonic() - began
    return REFERENCES[name]


def killed(name: str, folder: Path, dice: random.Random, seconds: float) -> int:
    """A run that is killed up to three times and then goes on to its end; how often it was."""
    images(folder)
    kills = 0
    while True:
        program = start(folder, "run.name=killed", *SETTINGS[name], SAVE)
        if kills == 3:
            break
        wait = dice.uniform(0.1, 1.2) * seconds
        end = time.monotonic() + wait
        while time.monotonic() < end and not program.ended:
            time.sleep(0.01)
        if program.ended:
            break
        program.kill()
        kills += 1
    assert program.wait() == 0, program.text
    return kills


def experiment(name: str, number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole, seconds = reference(name, tmp_path_factory.getbasetemp() / name.replace(" ", "_"))
    folder = tmp_path_factory.mktemp("killed")
    kills = killed(name, folder, random.Random(f"{name} {number}"), seconds)
    found = outcome(folder / "outputs" / "killed")
    assert found == whole, f"{name}, experiment {number}, {kills} kills"


@pytest.mark.faults
@pytest.mark.case(1)
@pytest.mark.parametrize("number", range(50))
def test_a_killed_run_ends_as_one_that_was_not(number, tmp_path_factory):
    names = list(SETTINGS)
    experiment(names[number % len(names)], number, tmp_path_factory)


@pytest.mark.full
@pytest.mark.case(1)
def test_a_killed_run_ends_as_one_that_was_not_once(tmp_path_factory):
    experiment("accumulated", 1000, tmp_path_factory)
