"""Stopping on a signal, after a checkpoint of the last full step."""

import contextlib
import math
import signal
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from conf.errors import StorageFailed, UserError
from conf.stops import INTERRUPTED, PREEMPTED
from models.callbacks.checkpoint import Checkpoints
from models.callbacks.loops import call_last, leave_signals_alone, log_step
from models.callbacks.signals import GRACE, SIGNALS, Requests, Stopped, requests


class Preemption(Callback):
    """Stops a run on SIGTERM, SIGUSR1, SIGUSR2, SIGHUP or SIGXCPU (status 75) or Ctrl-C (130), after saving the step.

    A handler only notes the signal (`models.callbacks.signals`); the ranks agree at the end of an optimizer step, save,
    and raise `Stopped`. During a validation they stop after the batch that they are at, since the step is already
    saved. A second Ctrl-C quits at once; a second other signal, two seconds or more after the first, ends a step that
    hangs. Where the step cannot be saved the status is that of the storage, 74: 75 says that nothing is lost.

    Args:
        grace: seconds without a finished batch after which one signal ends a process that hangs.
    """

    SIGNALS = SIGNALS

    def __init__(self, grace: float = GRACE) -> None:
        if isinstance(grace, bool) or not isinstance(grace, int | float) or not grace > 0:
            raise UserError(f"Preemption: grace must be a number of seconds above 0, got {grace!r}")
        self.grace = float(grace)
        self._requests = Requests()
        self._own = False
        self._group: Any = None
        self._checkpoints: Checkpoints | None = None
        self._seen_step = 0
        self._together = 0  # batches of validation that every rank has

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the callback that saves, and listens before Lightning would.

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
        leave_signals_alone(trainer)
        self._own = requests() is None
        self._requests = Requests() if self._own else requests()
        self._requests.grace = self.grace
        if self._own:
            self._requests.listen()
            self._requests.looked_at = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        call_last(trainer, self)  # behind Checkpoints too, which has put itself last in setup
        self._requests.looked_at = True
        self._requests.others = getattr(trainer.strategy.launcher, "procs", ())
        if trainer.world_size > 1:
            # A group of its own on the CPU: asking costs no synchronisation with the device.
            self._group = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._finished(trainer)
        self._stop_if_asked(trainer, save=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._finished(trainer)
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._validates(trainer) and self._group is not None:
            batches = trainer.num_val_batches[0]
            self._together = self._agreed(int(batches) if math.isfinite(batches) else 0, dist.ReduceOp.MIN)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._validates(trainer):
            self._finished(trainer)
            # processes may have different numbers of batches
            if self._group is None or (dataloader_idx == 0 and batch_idx < self._together):
                self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._validates(trainer):
            self._finished(trainer)
            self._stop_if_asked(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._requests.saving = True  # until the next batch, or the end: whoever saves

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._requests.saving = False
        if self._own:
            self._requests.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._requests.saving = False
        self._requests.looked_at = False  # everything is saved: what follows may be left at any moment
        if self._own:
            self._requests.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Of a run that was over before it began, which has no other end."""
        if self._own:
            self._requests.close()

    def _validates(self, trainer: pl.Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def _finished(self, trainer: pl.Trainer) -> None:
        self._requests.alive, self._requests.saving = time.monotonic(), False

    def _agreed(self, number: int, how: Any) -> int:
        """The largest or the smallest of the ranks' numbers."""
        if self._group is None:
            return number
        agreed = torch.tensor([number])
        dist.all_reduce(agreed, op=how, group=self._group)
        return int(agreed)

    def _stop_if_asked(self, trainer: pl.Trainer, save: bool = True) -> None:
        """Saves the step, if it is not, and raises `Stopped` if any rank was asked to."""
        number = self._agreed(self._requests.number, dist.ReduceOp.MAX)
        if not number:
            return
        self._requests.saving = True
        if save and trainer.training:
            log_step(trainer)
        lost = self._lost(trainer, save)
        self._requests.saving, self._requests.stopped = False, True
        message = f"stopped by {signal.Signals(number).name} at step {trainer.global_step}"
        if lost:
            message += f", which is lost: {lost}"
        elif self._checkpoints.saved_step >= 0:
            message += f"; to go on: resume={self._checkpoints.directory / 'last'}"
        if trainer.is_global_zero:
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                print(message, file=sys.stderr, flush=True)
        others = getattr(trainer.strategy.launcher, "procs", None)
        if others:
            others.clear()  # they stop too: Lightning's observer would kill this process for it
        asked = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        raise Stopped(StorageFailed.status if lost else asked, message)

    def _lost(self, trainer: pl.Trainer, save: bool) -> str:
        """Saves the step; why it is not on the disk, "" where it is."""
        with contextlib.suppress(StorageFailed):  # of a save that was begun before: there may be room now
            self._checkpoints.saver.settle(trainer)
        try:
            if save:
                self._checkpoints.save(trainer, final=True)
        except StorageFailed as error:
            return str(error)
        return ""
