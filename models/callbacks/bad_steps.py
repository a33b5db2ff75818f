"""What is known of a step whose loss or gradient is not finite: a line for the terminal, a file for later."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from models.callbacks.culprit import Finding, LastPass
from models.callbacks.finite import check_finite
from models.callbacks.left_out import local
from models.side_outputs import put

FOLDER = "non_finite"
SHOWN = 5  # images and weights that the line names


class BadStep(NamedTuple):
    """A step that cannot be used, as one process saw it; `loss` and `gradient_norm` are before clipping."""

    step: int
    epoch: int
    learning_rate: float
    rank: int
    loss: float
    gradient_norm: float
    indices: list[int]  # the images of the step, positions in the training data
    suspects: list[int]  # those of them whose outputs are not finite, where that can be told
    files: dict[int, str]  # of the suspects, or of all, where the data has files
    where: str | None  # the first place that is not finite
    gradients: list[str]  # names of weights whose gradient is not finite
    weights_are_finite: bool

    @property
    def what(self) -> str:
        return "a gradient" if math.isfinite(self.loss) else "the training loss"

    def line(self, left_out: int, limit: int) -> str:
        """One line: where, how bad, which images, which module, and how often in a row."""
        known = [
            f"learning rate {self.learning_rate:.3g}",
            f"loss {self.loss:.4g}",
            f"gradient norm {self.gradient_norm:.3g}",
            _shown(self.suspects or self.indices, self.files),
            f"first in {self.where}" if self.where else _weights(self.gradients),
        ]
        return (
            f"step {self.step}, epoch {self.epoch}: {self.what} is NaN or infinite; the step is left out "
            f"({left_out} in a row, {limit} allowed): {'; '.join(filter(None, known))}"
        )


def look(trainer: pl.Trainer, task: pl.LightningModule, last: LastPass | None, **known: Any) -> BadStep:
    """All processes come here together; what the first of them that is bad by itself saw.

    Args:
        known: what the guard has counted: loss, gradient_norm, batches (their images, a tensor each).
    """
    indices = [int(index) for batch in known["batches"] for index in batch]
    found = _found(trainer, task, last)
    rows = found.rows.tolist() if found.rows is not None else []
    newest = known["batches"][-1].tolist() if known["batches"] else []
    suspects = [index for index, bad in zip(newest, rows, strict=False) if bad] if len(rows) == len(newest) else []
    mine = BadStep(
        step=trainer.global_step + 1,
        epoch=trainer.current_epoch,
        learning_rate=rate_of(trainer),
        rank=trainer.global_rank,
        loss=known["loss"],
        gradient_norm=known["gradient_norm"],
        indices=indices,
        suspects=suspects,
        files=_files(trainer.datamodule, suspects or indices),
        where=found.where,
        gradients=check_finite({name: local(w.grad) for name, w in task.named_parameters() if w.grad is not None}),
        weights_are_finite=not check_finite({name: local(weight) for name, weight in task.named_parameters()}),
    )
    seen = [mine]
    if trainer.world_size > 1:
        seen = [None] * trainer.world_size
        dist.all_gather_object(seen, mine)
    return min(seen, key=_blame)


def keep(step: BadStep, folder: Path) -> Path:
    """Writes all of it below the folder of the run."""
    path = folder / FOLDER / f"step-{step.step:08d}.json"
    text = json.dumps({name: _plain(value) for name, value in step._asdict().items()}, indent=1)
    path.parent.mkdir(exist_ok=True)
    put(path, f"{text}\n")
    return path


def rate_of(trainer: pl.Trainer) -> float:
    """The largest learning rate; NaN where there is none."""
    rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return max(rates, default=math.nan)


def _blame(step: BadStep) -> tuple[bool, bool, bool, int]:
    """The process with a loss that is not finite first, then one that found where, then the weights, then any."""
    return math.isfinite(step.loss), step.where is None, step.weights_are_finite, step.rank


def _found(trainer: pl.Trainer, task: pl.LightningModule, last: LastPass | None) -> Finding:
    """Nothing where a pass of one process alone would wait for the others, or does not fit any more."""
    if last is None or not _alone(trainer, task):
        return Finding(None, None)
    try:
        return last.first_bad(trainer.precision_plugin.forward_context)
    except RuntimeError:  # of the memory, for one: the step is bad, whether its place is known or not
        return Finding(None, None)


def _alone(trainer: pl.Trainer, task: nn.Module) -> bool:
    """Whether a pass asks nothing of other processes: where it ends differs from one to the next."""
    if trainer.world_size == 1 or not isinstance(trainer.strategy, DDPStrategy):
        return isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    asks = any(isinstance(part, nn.SyncBatchNorm) or getattr(part, "asks_others", False) for part in task.modules())
    return not asks and not any(hasattr(weight, "full_tensor") for weight in task.parameters())


def _files(data: Any, indices: list[int]) -> dict[int, str]:
    """Of a data module whose images are files."""
    path = getattr(getattr(getattr(data, "source", None), "train", None), "path", None)
    try:
        return {index: str(path(index)) for index in indices} if callable(path) else {}
    except AttributeError:  # a part of a split without files
        return {}


def images_of(data: Any, indices: list[int]) -> str:
    """ "images 3, 12, 7 and 61 more", by their files where the data has files."""
    return _shown(indices, _files(data, indices[:SHOWN]))


def _shown(indices: list[int], files: dict[int, str]) -> str:
    named = [files.get(index, str(index)) for index in indices[:SHOWN]]
    more = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
    return f"image{'s' if len(indices) > 1 else ''} {', '.join(named)}{more}" if named else ""


def _weights(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"in the gradient of {', '.join(names[:SHOWN])}{more}" if names else ""


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
