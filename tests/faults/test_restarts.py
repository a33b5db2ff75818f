"""A run that is stopped or killed at any places, any number of times, ends as the one that never stopped."""

import os
import random
import signal

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from models.callbacks.checkpoint import Checkpoints
from models.callbacks.signals import Stopped
from models.checkpoints import read_manifest
from models.loggers.metrics_csv import MetricsCSV, read_metrics
from models.runs.resume import find_resume
from tests.models.callbacks.tiny_run import fingerprint, fit

pytestmark = [pytest.mark.case(1), pytest.mark.case(23)]

SETTINGS = (  # of 8 batches an epoch
    {"epochs": 3},
    {"epochs": 3, "every": 1},
    {"epochs": 3, "accumulate_grad_batches": 2},
    {"epochs": 3, "accumulate_grad_batches": 3, "every": 100},
    {"epochs": 3, "check_val_every_n_epoch": 2},
    {"epochs": 3, "val_check_interval": 4, "every": 2},
    {"epochs": 3, "val_check_interval": 3},
    {"epochs": 9, "max_steps": 19},
    {"epochs": -1, "max_steps": 16, "every": 5},
    {"epochs": 3, "limit_train_batches": 5},
    {"epochs": 3, "limit_val_batches": 0},
    {"epochs": 4, "check_val_every_n_epoch": None, "val_check_interval": 11, "every": 4},
)


class Killed(BaseException):
    """What `kill -9` is to a process, as far as one process can do it to a run."""


class Fate(Callback):
    """Stops or kills a run at its n-th moment: the start of a training batch, of a batch of validation, or a save."""

    def __init__(self, moment: int | None = None, kill: bool = False) -> None:
        self.left, self.kill = moment, kill

    def _moment(self, *_, **__) -> None:
        if self.left is None:
            return
        self.left -= 1
        if self.left < 0:
            self.left = None
            if self.kill:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    on_train_batch_start = on_validation_batch_start = on_save_checkpoint = _moment

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        pl_module.log("train/loss", outputs["loss"])


def start(folder, settings, fate):
    """One start of the run; None where it was ended."""
    found = find_resume("auto", folder)
    logger = MetricsCSV(folder / "metrics.csv", read_manifest(found)["step"] if found else 0)
    try:
        return fit(folder, resume="auto", callbacks=(fate,), logger=logger, log_every_n_steps=1, **settings)
    except (Stopped, Killed):
        return None


def ended(folder, task, trainer):
    """Everything that must be the same in the end."""
    saver = next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoints))
    pointers = [(folder / "checkpoints" / name).resolve().name for name in ("best", "last")]
    rows = [sorted(row.items()) for row in read_metrics(folder / "metrics.csv")]
    return fingerprint(task, trainer) | {
        "best step": saver.kept.best.step if saver.kept.best else -1,
        "pointers": pointers,
        "rows": rows,
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run of each setting that never stopped."""
    runs = {}

    def get(number):
        if number not in runs:
            folder = tmp_path_factory.mktemp("reference")
            runs[number] = ended(folder, *start(folder, SETTINGS[number], Fate()))
        return runs[number]

    return get


def differences(found, expected):
    def same(name):
        value = expected[name]
        return torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value

    return [name for name in expected if not same(name)]


def sequence(folder, seed, most=6):
    """A run with three to `most` ends at random moments, then to its end: the number of its settings, both of them."""
    choose = random.Random(seed)
    number = seed % len(SETTINGS)
    story = []
    for _ in range(choose.randint(3, most)):
        story.append((choose.randint(0, 20), choose.random() < 0.4))
        start(folder, SETTINGS[number], Fate(*story[-1]))
    return number, story, ended(folder, *start(folder, SETTINGS[number], Fate()))


QUICK = (0, 2, 5, 7)  # plain, accumulating, validating within epochs, by steps


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in QUICK else pytest.mark.full) for seed in range(len(SETTINGS))]
)
def test_a_run_that_is_stopped_again_and_again_ends_where_it_would_have(tmp_path, uninterrupted, seed):
    number, story, found = sequence(tmp_path, seed, most=3)
    assert differences(found, uninterrupted(number)) == [], story


@pytest.mark.faults
def test_a_hundred_sequences(tmp_path, uninterrupted):
    wrong = {}
    for seed in range(100, 200):
        number, story, found = sequence(tmp_path / str(seed), seed)
        if different := differences(found, uninterrupted(number)):
            wrong[seed] = (SETTINGS[number], story, different)
    assert wrong == {}
