"""Stopping on a signal, after a checkpoint of the last full step."""

import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from conf.errors import UserError
from models.callbacks.checkpoint import Checkpoints
from models.callbacks.loops import call_last

log = logging.getLogger(__name__)

PREEMPTED = 75  # sysexits' EX_TEMPFAIL: start the same command again
INTERRUPTED = 130  # what shells report for Ctrl-C


class Stopped(Exception):
    """Training was stopped on request, after saving; the entry point exits with `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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
            raise UserError(
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
