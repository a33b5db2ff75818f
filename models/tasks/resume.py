"""Stopping and going on: batch-wise randomness, stopping on a signal, and finding the checkpoint to resume from.

A resumed run equals an uninterrupted one bit for bit because nothing depends on the history of a random generator:
the data module derives order and augmentation from counters, and `StepRandomness` does the same for dropout.
"""

import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from models.checkpoints.directory import latest, nearby, resolve, verify
from models.checkpoints.write import recover
from models.tasks.checkpoint import Checkpoints, call_last

log = logging.getLogger(__name__)

# What must be the same in a continued run, and what in there may change all the same.
SAME = ("model", "image_size", "data", "augment", "optimizer", "schedule", "task", "seed", "trainer")
FREE = (
    *("data.root", "data.source.root", "data.source.path", "data.source.data_dir", "data.source.data_files"),
    *("data.token_labels", "data.source.cache_dir", "data.workers", "data.timeout", "data.on_error"),
    *("task.compile", "task.gradient_checkpointing", "task.autoencoder", "task.sampling", "task.score"),
    *("task.sample_every_n_epochs", "task.seed"),
    "data.batch_size",  # the data module compares the batch of all processes together
    # copies of other settings
    *("model.attention", "model.image_size", "data.image_size", "data.eval.size", "data.num_classes", "data.seed"),
    *(f"trainer.{name}" for name in ("_target_", "max_epochs", "max_steps", "max_time", "accelerator", "devices")),
    *(f"trainer.{name}" for name in ("strategy", "num_nodes", "precision", "log_every_n_steps", "limit_val_batches")),
    *(f"trainer.{name}" for name in ("check_val_every_n_epoch", "deterministic", "benchmark")),
    *(
        "trainer.accumulate_grad_batches",
        "data.augment",
        "task.model",
        "task.optimizer",
        "task.schedule",
        "task.num_classes",
    ),
)

PREEMPTED = 75  # sysexits' EX_TEMPFAIL: start the same command again
INTERRUPTED = 130  # what shells report for Ctrl-C


class Stopped(Exception):
    """Training was stopped on request, after saving; the entry point exits with `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StepRandomness(Callback):
    """Seeds torch, NumPy and `random` before every training batch from (seed, epoch, batch number, rank)."""

    def __init__(self, seed: int) -> None:
        if type(seed) is not int or seed < 0:
            raise ValueError(f"StepRandomness: seed must be an integer of at least 0, got {seed!r}")
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epoch, number = getattr(batch, "epoch", None), getattr(batch, "number", None)
        if epoch is None or number is None:
            raise ValueError(
                "StepRandomness: a training batch must be a named tuple with the fields epoch and number, "
                f"got {type(batch).__name__}; build it as data.Batch is built"
            )
        entropy = [self.seed, int(epoch), int(number), trainer.global_rank]
        torch_seed, numpy_seed, python_seed = np.random.SeedSequence(entropy).generate_state(3, np.uint64).tolist()
        # The generator itself: torch.manual_seed costs 90 µs because it also prepares devices that are not there.
        torch.default_generator.manual_seed(torch_seed % 2**63)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(torch_seed % 2**63)
        np.random.seed(numpy_seed % 2**32)
        random.seed(python_seed)


class Preemption(Callback):
    """Stops a run on SIGTERM or SIGUSR1 (status 75) or Ctrl-C (status 130), with a checkpoint of the last full step.

    A handler only notes the signal; the ranks agree at the end of an optimizer step, save, and raise `Stopped`. During
    a validation a single process stops after the batch it is at, since the step is already saved; several processes
    stop after the validation, because they may have different numbers of batches. A second Ctrl-C quits at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()
        self._group: Any = None
        self._checkpoints: Checkpoints | None = None
        self._seen_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the callback that saves.

        Raises:
            ValueError: there is none, or more than one.
        """
        if stage != "fit":
            return
        found = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]
        if len(found) != 1:
            raise ValueError(
                f"Preemption: needs one Checkpoints callback beside it, got {len(found)}; "
                "set callbacks.preemption=null where there are no checkpoints"
            )
        self._checkpoints = found[0]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        call_last(trainer, self)  # behind Checkpoints too, which has put itself last in setup

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_over(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._take_over(trainer)
        if trainer.world_size > 1:
            # A group of its own on the CPU: asking costs no synchronisation with the device.
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.world_size == 1 and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_asked(trainer, save=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_asked(trainer, save=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._give_back()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._give_back()

    def _take_over(self, trainer: pl.Trainer) -> None:
        """Installs the handlers in place of Lightning's, whose SIGTERM handler waits for the other ranks."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only
        self._process = os.getpid()
        for number in self.SIGNALS:
            previous = signal.signal(number, self._note)
            self._previous.setdefault(number, previous)
        # Lightning asks rank 0 about SIGTERM before each batch, on the device; with these handlers nobody needs it.
        if hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"):
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A worker of a data loader inherits it, and so outlives a signal sent to the whole job.

        The second Ctrl-C ends this process. The second SIGTERM ends a worker: the loader and Python's exit each send
        one to a worker that hangs.
        """
        last_word = signal.SIGINT if os.getpid() == self._process else signal.SIGTERM
        if number == last_word and number in self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received.add(number)

    def _stop_if_asked(self, trainer: pl.Trainer, save: bool = True) -> None:
        """Saves, unless the state is that of a half-done validation, and raises `Stopped` if any rank was asked to."""
        number = max(self._received, default=0)
        if self._group is not None:
            agreed = torch.tensor([number])
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
            number = int(agreed)
        if not number:
            return
        checkpoints = self._checkpoints
        if save and checkpoints.saved_step != trainer.global_step and not checkpoints.save(trainer):
            log.warning("Preemption: stopping without a checkpoint of step %d", trainer.global_step)
        message = f"stopped by {signal.Signals(number).name} at step {trainer.global_step}"
        if checkpoints.saved_step >= 0:
            message += f"; to go on: resume={checkpoints.directory / 'last'}"
        if trainer.is_global_zero:
            print(message, file=sys.stderr, flush=True)
        raise Stopped(INTERRUPTED if number == signal.SIGINT else PREEMPTED, message)


def _ask_nobody() -> None:
    """Stands in for Lightning's broadcast, one device synchronisation for each batch."""


def find_resume(resume: str | None, run_dir: str | os.PathLike) -> Path | None:
    """The checkpoint directory to resume from, verified.

    Args:
        resume: None or "" for a new run; "auto" for the newest valid checkpoint of the run folder, if there is one;
            otherwise the path of a checkpoint directory or a `best` or `last` pointer.
        run_dir: the folder of the run.

    Raises:
        ValueError: the path is no valid checkpoint; the message names those that exist near it.
    """
    if not resume:
        return None
    if resume == "auto":
        directory = Path(run_dir) / "checkpoints"
        recover(directory)
        found = latest(directory, log.warning)
        log.debug("resume=auto: %s", f"continuing {found}" if found else f"no checkpoint in {directory}, starting at 0")
        return found
    path = Path(resume)
    if path.suffix in (".safetensors", ".pth", ".pt", ".ckpt") and path.is_file():
        raise ValueError(
            f"resume: a single file holds weights and nothing of the optimizer, got {path}; {nearby(path)}"
        )
    path = resolve(path)
    verify(path)
    return path


def compare_configs(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compares what a continued run must have in common with its checkpoint: model, data, augmentation, optimisation.

    Free to change are the trainer (a longer run, other devices), loggers, callbacks, where data lies and how it is
    read, and what computes the attention (`backend`), which changes it by rounding only.

    Args:
        saved: the configuration in the checkpoint.
        current: the resolved configuration of this command.

    Raises:
        ValueError: one sentence that names every difference, with both values.
    """
    if found := differences(saved, current, SAME):
        raise ValueError(
            f"resume: the checkpoint was trained with {', '.join(found)} as this command asks; "
            "give the same options, or start a new run with another run.name"
        )


def differences(saved: dict[str, Any], current: dict[str, Any], sections: Iterable[str]) -> list[str]:
    """Every setting of the attention and of some sections that two configurations have otherwise: "x and not y"."""
    saved, current = without_backend(saved), without_backend(current)
    before, after = saved.get("attention"), current.get("attention")
    found = []
    if before != after and None not in (before, after):
        found.append(f"attention {_describe(before, after)} and not {_describe(after, before)}")
    for section in sections:
        was, now = (dict(_settings(config.get(section), section)) for config in (saved, current))
        for key in {**was, **now} if was and now and section != "attention" else ():
            if was.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE):
                name = key.removesuffix("._target_")
                found.append(f"{name} {_describe(was.get(key), None)} and not {_describe(now.get(key), None)}")
    return found


def without_backend(node: Any) -> Any:
    """A configuration without what computes its attention."""
    if isinstance(node, list):
        return [without_backend(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {key: without_backend(value) for key, value in node.items() if key != "backend"}


def _settings(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every setting below a node, by its full key; lists count as one setting."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _settings(value, f"{path}.{name}")
    elif node is not None:
        yield path, node


def _describe(value: Any, other: Any) -> str:
    """A value in words; of a configured part its name and the options in which it differs from the other."""
    if isinstance(value, list):
        others = other if isinstance(other, list) else []
        return " / ".join(_describe(part, base) for part, base in zip_longest(value, others[: len(value)]))
    if isinstance(value, str):
        return value.rpartition(".")[2]
    if not isinstance(value, dict):
        return str(value)
    name = str(value.get("_target_")).rpartition(".")[2]
    same = isinstance(other, dict) and other.get("_target_") == value.get("_target_")
    changed = {key: item for key, item in value.items() if same and (key not in other or other[key] != item)}
    options = [
        f"{key}={_describe(item, other.get(key)) if isinstance(item, dict) else item}" for key, item in changed.items()
    ]
    return f"{name}({', '.join(options)})" if options else name
