"""Stops a run whose loss or weights are no longer finite, before such weights reach a checkpoint."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from conf.errors import UserError
from models.callbacks.checkpoint import Checkpoints

# A moment of training in one integer, so that the first one survives a minimum: the epoch above, the step below.
_STEPS = 2**40
_NEVER = 2**62


class NonFinite(RuntimeError):
    """Training cannot go on: the loss or the weights hold NaN or infinity."""


class NonFiniteGuard(Callback):
    """Raises `NonFinite` when the training loss becomes NaN or infinite, and when weights to be saved are.

    The step of the first such loss is kept on the device and read every `every_n_steps` optimizer steps, and always
    before a checkpoint is written: reading it at each step would make the host wait for the GPU.

    Args:
        every_n_steps: steps between reads; default 1 on a CPU and 50 on a GPU.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise UserError(f"NonFiniteGuard: every_n_steps must be at least 1 or null, got {every_n_steps!r}")
        self.every_n_steps = every_n_steps
        self._first: Tensor | None = None  # moment of the first bad loss, int64 on the device
        self._interval = 1
        self._seen_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._interval = self.every_n_steps or (50 if pl_module.device.type == "cuda" else 1)
        self._first = torch.full((), _NEVER, dtype=torch.int64, device=pl_module.device)
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        moment = trainer.current_epoch * _STEPS + trainer.global_step
        now = torch.where(torch.isfinite(loss.detach()).all(), _NEVER, moment)
        self._first = torch.minimum(self._first, now)
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            if trainer.global_step % self._interval == 0:
                self._check_loss(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_loss(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Runs on every rank before a checkpoint is written, and stops that by raising."""
        if self._first is None:
            return
        self._check_loss(trainer)
        weights = [value for value in checkpoint["state_dict"].values() if value.is_floating_point()]
        finite = torch.stack([torch.isfinite(value).all() for value in weights]).all()
        if trainer.strategy.reduce((~finite).float(), reduce_op="max"):
            where = _situation(trainer, trainer.current_epoch, trainer.global_step)
            raise NonFinite(f"NonFiniteGuard: the weights hold NaN or infinity, {where}")

    def _check_loss(self, trainer: pl.Trainer) -> None:
        """Reads the flag; all ranks come here at the same steps, and raise together."""
        first = int(trainer.strategy.reduce(self._first, reduce_op="min"))
        if first != _NEVER:
            where = _situation(trainer, *divmod(first, _STEPS))
            raise NonFinite(f"NonFiniteGuard: the training loss is NaN or infinite, {where}")


def _situation(trainer: pl.Trainer, epoch: int, step: int) -> str:
    """The second half of the message: where training stood, and what is left of it."""
    rates = sorted({float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups})
    rate = f"{rates[-1]:.3g}" if rates else "unknown"
    saver = next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)
    good = f"the last good checkpoint is {saver.last}" if saver and saver.last else "no checkpoint was saved before"
    return f"got it at step {step}, epoch {epoch}, learning rate {rate}; {good}; lower the rate"
