"""A loss, a gradient or weights that are no longer finite: the step is left out, and a run that goes on so is stopped.

What is left out changes nothing: weights, moments, averages, running statistics stay as they were. The step counts:
the rate goes on by its schedule, the next step has the next images, and a resumed run does the same.
"""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from conf import values
from conf.errors import NumericsFailed, UserError
from models.callbacks import bad_steps
from models.callbacks.checkpoint import saver_of
from models.callbacks.culprit import LastPass
from models.callbacks.directory_io import EMA_KEY
from models.callbacks.finite import check_finite
from models.callbacks.left_out import Kept, local
from models.side_outputs import attempt

# A moment of training in one integer, so that the first one survives a minimum: the epoch above, the step below.
_STEPS = 2**40
_NEVER = 2**62
BROKEN = "the weights hold NaN or infinity"


class NonFinite(NumericsFailed):
    """Training cannot go on: the loss or the weights hold NaN or infinity."""


class NonFiniteGuard(Callback):
    """Leaves out steps whose loss or gradient is NaN or infinite, and raises `NonFinite` where that does not help.

    Loss and norm of the gradient are looked at before the optimizer's step, on all processes together: one number is
    read from the device. Weights, averages and moments that are to be saved are looked at, all of them.

    Args:
        every_n_steps: reads that number only so often, always before a checkpoint is written; the host then does not
            wait for a GPU at each step, but no step can be left out any more: the first bad one stops the run. Default:
            every step where steps are left out or on a CPU, else every 50.
        skip: so many bad steps in a row are left out, each said in a line and kept in `non_finite/` of the run's
            folder; one more stops the run. 0: the first one does.

    With `trainer.precision=16-mixed` gradients that overflow are the scaler's business as long as its scale is above 1.
    """

    def __init__(self, every_n_steps: int | None = None, skip: int = 0) -> None:
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise UserError(f"NonFiniteGuard: every_n_steps must be at least 1 or null, got {every_n_steps!r}")
        values.whole("NonFiniteGuard", "skip", skip, 0, fix="set callbacks.non_finite.skip=10")
        self.every_n_steps, self.skip = every_n_steps, skip if every_n_steps is None else 0
        self.in_a_row = self.left_out = 0  # bad steps up to now, and of the whole run
        self._first: Tensor | None = None  # moments of the first bad loss and gradient, int64 on the device
        self._bad: Tensor | None = None  # whether loss and gradient of the step that is being made are
        self._losses: list[Tensor] = []  # of this step, one for each batch
        self._batches: list[Tensor] = []
        self._interval = 1
        self._seen_step = self._begun = -1
        self._kept: Kept | None = None
        self._last: LastPass | None = None
        self._reason = ""  # why the run must stop

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "left_out": self.left_out}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.in_a_row, self.left_out = state_dict["in_a_row"], state_dict["left_out"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        often = 1 if self.skip or pl_module.device.type != "cuda" else 50
        self._interval = self.every_n_steps or often
        self._first = torch.full((2,), _NEVER, dtype=torch.int64, device=pl_module.device)
        self._seen_step, self._begun, self._reason = trainer.global_step, -1, ""
        pl_module.step_left_out = False
        if self.skip:
            self._kept = pl_module.kept = Kept(pl_module)
            self._last = None if getattr(pl_module, "compiled", False) else LastPass(pl_module.model)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._reason:  # not at once: what saves has seen the step now
            self._stop(trainer)
        if self._begun != trainer.global_step:  # not so in the middle of an accumulated batch
            self._begun, self._losses, self._batches = trainer.global_step, [], []
            self._bad = torch.zeros(2, dtype=torch.bool, device=pl_module.device)
            pl_module.step_left_out = False
            if self._kept is not None:
                self._kept.keep()
        if self.skip and isinstance(indices := getattr(batch, "indices", None), Tensor):
            self._batches.append(indices)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self._bad[0] |= ~torch.isfinite(loss.detach()).all()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        norm = _norm(optimizer)
        if (scale := scale_of(trainer)) is None or scale <= 1:
            self._bad[1] = ~torch.isfinite(norm)
        moment = trainer.current_epoch * _STEPS + trainer.global_step + 1
        self._first = torch.minimum(self._first, torch.where(self._bad, moment, _NEVER))
        if not self.skip:
            return
        if not trainer.strategy.reduce(self._bad.any().float(), reduce_op="max"):
            self.in_a_row = 0
            return
        self._first.fill_(_NEVER)
        self.in_a_row, self.left_out = self.in_a_row + 1, self.left_out + 1
        self._leave_out(trainer, pl_module, optimizer, float(norm), scale or 1.0)

    def _leave_out(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        norm: float,
        scale: float,
    ) -> None:
        """Says what is known of the step and takes its gradients away; the next batch does not begin if it must not."""
        parts = trainer.accumulate_grad_batches / max(1, len(self._losses))  # by which Lightning has divided
        loss = sum(float(loss) for loss in self._losses) * parts / scale
        known = {"loss": loss, "gradient_norm": norm, "batches": self._batches}
        bad = bad_steps.look(trainer, task, self._last, **known)
        self._kept.leave_out(optimizer)
        task.step_left_out = True
        if trainer.is_global_zero:
            print(bad.line(self.in_a_row, self.skip), flush=True)
            attempt(f"{bad_steps.FOLDER}/", bad_steps.keep, bad, Path(trainer.default_root_dir))
        if not bad.weights_are_finite:
            self._reason = BROKEN
        elif self.in_a_row > self.skip:
            self._reason = f"{bad.what} is NaN or infinite"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        if self._kept is not None:
            self._kept.after(trainer.optimizers[0])
        if self._last is not None:
            self._last.forget()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer, pl_module)
        if not self.skip and trainer.global_step % self._interval == 0:
            self._check_steps(trainer)

    def _log(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if (scale := scale_of(trainer)) is not None:
            task.log("train/loss_scale", scale, rank_zero_only=True)
        if self.left_out:
            task.log("train/left_out", float(self.left_out), rank_zero_only=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_steps(trainer)
        self._remove(pl_module)
        if self._reason or (self.skip and self.in_a_row > self.skip):  # no other step begins, also in a further start
            self._reason = self._reason or "the training loss or a gradient is NaN or infinite"
            self._stop(trainer)
        if self.left_out and trainer.is_global_zero:
            print(f"{self.left_out} steps were left out, see {bad_steps.FOLDER}/ in the folder of the run", flush=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove(pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Runs on every rank before a checkpoint is written, and stops that by raising."""
        if self._first is None:
            return
        self._check_steps(trainer)
        for what, tensors in _saved(checkpoint).items():
            bad = check_finite(tensors)
            if trainer.strategy.reduce(torch.tensor(float(len(bad)), device=pl_module.device), reduce_op="max"):
                where = _situation(trainer, trainer.current_epoch, trainer.global_step)
                first = f"; first in {bad[0]}" if bad else ""
                raise NonFinite(f"NonFiniteGuard: the {what} hold NaN or infinity, {where}{first}")

    def _check_steps(self, trainer: pl.Trainer) -> None:
        """Reads the moment of the first bad step; all ranks come here at the same steps, and raise together."""
        loss, gradient = trainer.strategy.reduce(self._first, reduce_op="min").tolist()
        if min(loss, gradient) != _NEVER:
            what = "the training loss" if loss <= gradient else "a gradient"
            where = _situation(trainer, *divmod(min(loss, gradient), _STEPS))
            raise NonFinite(f"NonFiniteGuard: {what} is NaN or infinite, {where}")

    def _stop(self, trainer: pl.Trainer) -> None:
        """On all processes: what was reached is saved, unless the weights are broken."""
        saver = saver_of(trainer)
        if saver is not None and self._reason != BROKEN:
            saver.save(trainer)
        raise NonFinite(f"NonFiniteGuard: {self._reason}, {self._stopped(trainer)}")

    def _stopped(self, trainer: pl.Trainer) -> str:
        where = _situation(trainer, trainer.current_epoch, trainer.global_step)
        return f"{where}; the last {self.in_a_row} steps were left out, see {bad_steps.FOLDER}/, or try debug=anomaly"

    def _remove(self, task: pl.LightningModule) -> None:
        task.kept = None
        if self._last is not None:
            self._last.remove()
        self._last = None


def scale_of(trainer: pl.Trainer) -> float | None:
    """By which the scaler of `16-mixed` multiplies the loss; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def _norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Of the gradient on this process."""
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients])))


def _saved(checkpoint: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Every tensor of a checkpoint that training has computed, by what it is; of shards those of this process."""
    moments = {
        f"{name} of weight {number}": value
        for optimizer in checkpoint.get("optimizer_states", [])
        for number, state in optimizer.get("state", {}).items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    kinds = {"weights": checkpoint["state_dict"], "averaged weights": checkpoint.get(EMA_KEY) or {}, "moments": moments}
    return {what: {name: local(value) for name, value in state.items()} for what, state in kinds.items()}


def _situation(trainer: pl.Trainer, epoch: int, step: int) -> str:
    """The second half of the message: where training stood, and what is left of it."""
    rate = bad_steps.rate_of(trainer)
    shown = f"{rate:.3g}" if math.isfinite(rate) else "unknown"
    saver = saver_of(trainer)
    good = f"the last good checkpoint is {saver.last}" if saver and saver.last else "no checkpoint was saved before"
    return f"got it at step {step}, epoch {epoch}, learning rate {shown}; {good}; lower the rate"
