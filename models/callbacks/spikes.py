"""Says where the training loss jumps far above that of the steps before, with the images of the step.

A jump is a loss above the median of the last steps by `factor` of their spread (1.4826 x the median distance from it,
which is the standard deviation of normal noise; at least a hundredth of the median). Nothing is done about it.
"""

import statistics
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from conf import values
from models.callbacks.bad_steps import images_of, rate_of
from models.side_outputs import append, attempt, put

FILE, COLUMNS = "spikes.csv", ("step", "epoch", "loss", "median", "spread", "learning_rate", "images")
NORMAL, LEAST_SPREAD = 1.4826, 0.01


class Step(NamedTuple):
    """One that was made: its loss is on the device until it is looked at."""

    step: int
    epoch: int
    rate: float
    loss: Tensor
    images: list[Tensor]


class Spikes(Callback):
    """See the module's docstring. The losses of a GPU are read when the trainer logs, so that it is not waited for.

    Args:
        window: steps that the median is of; nothing is said before half of them were seen.
        factor: how many times the spread a loss must be above the median.
    """

    def __init__(self, window: int = 128, factor: float = 10.0) -> None:
        values.whole("Spikes", "window", window, 8, fix="set callbacks.spikes.window=128")
        values.number("Spikes", "factor", factor, 1, fix="set callbacks.spikes.factor=10")
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=window)
        self._waiting: list[Step] = []
        self._parts: list[Tensor] = []  # losses of the batches of the step that is being made
        self._images: list[Tensor] = []
        self._seen_step = self._last_said = -1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "last_said": self._last_said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses.extend(state_dict["losses"])
        self._last_said = state_dict.get("last_said", -1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._waiting, self._parts, self._images = [], [], []
        if trainer.is_global_zero:
            attempt(FILE, _forget_later, Path(trainer.default_root_dir) / FILE, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        self._parts.append(loss.detach())
        self._images += [batch.indices] if isinstance(getattr(batch, "indices", None), Tensor) else []
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        mean = torch.stack(self._parts).mean() * trainer.accumulate_grad_batches  # by which Lightning has divided
        self._waiting.append(Step(trainer.global_step, trainer.current_epoch, rate_of(trainer), mean, self._images))
        self._parts, self._images = [], []
        alone = trainer.world_size == 1 and pl_module.device.type == "cpu"
        if alone or trainer.global_step % trainer.log_every_n_steps == 0:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """On all processes: a run that goes on from there knows every loss before it."""
        self._look(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        """All processes come here with the same steps."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        losses = trainer.strategy.reduce(torch.stack([step.loss for step in waiting]), reduce_op="mean").tolist()
        for step, loss in zip(waiting, losses, strict=True):
            if loss - loss != 0:  # not finite: the guard's
                continue
            known = self._losses
            if len(known) >= known.maxlen // 2:
                median = statistics.median(known)
                around = statistics.median(abs(value - median) for value in known)
                spread = max(NORMAL * around, LEAST_SPREAD * abs(median))
                if loss > median + self.factor * spread:
                    self._say(trainer, step, loss, median, spread)
            known.append(loss)

    def _say(self, trainer: pl.Trainer, step: Step, loss: float, median: float, spread: float) -> None:
        """A line for the first of several in a row, and a row for each."""
        images = [int(index) for batch in step.images for index in batch]
        if trainer.world_size > 1:
            everywhere: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(everywhere, images)
            images = [index for part in everywhere for index in part]
        first, self._last_said = self._last_said != step.step - 1, step.step
        if not trainer.is_global_zero:
            return
        if first:
            shown = images_of(trainer.datamodule, images)
            print(
                f"step {step.step}, epoch {step.epoch}: the training loss {loss:.4g} is far above its median of the "
                f"last {len(self._losses)} steps, {median:.4g} ± {spread:.2g}; {FILE} has all of its {shown}",
                flush=True,
            )
        row = (step.step, step.epoch, f"{loss:.6g}", f"{median:.6g}", f"{spread:.3g}", f"{step.rate:.6g}")
        path = Path(trainer.default_root_dir) / FILE
        attempt(FILE, _add, path, (*map(str, row), " ".join(map(str, images))))


def _add(path: Path, row: tuple[str, ...]) -> None:
    header = "" if path.exists() else ",".join(COLUMNS) + "\n"
    append(path, header + ",".join(row) + "\n")


def _forget_later(path: Path, step: int) -> None:
    """Rows of steps that are made again, after a resume."""
    if not path.exists():
        return
    head, *rows = path.read_text().splitlines(keepends=True)
    put(path, "".join([head, *(row for row in rows if int(row.partition(",")[0]) <= step)]))
