"""What every task shares: optimizer, schedule, auxiliary losses, metrics of the raw and of the averaged weights.

Shapes: L = layers that return an auxiliary loss.
"""

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from conf.errors import UserError
from models.side_outputs import attempt, put
from models.tasks.adaptive_clip import check_alone, check_clip, clip
from models.tasks.effective_batch import images_per_step, scaled_rate, share_of
from models.tasks.matching import Predict, matching_of
from models.tasks.schedule import Schedule, check_number, check_schedule

REDUCTIONS = {"mean": Tensor.mean, "sum": Tensor.sum}
# losses that bring their factor, unless a task weights them: those of attention=routing and sea; that of sparsifiner,
# whose authors have 0.01 for the sum over the 168 images of a process; and that of OverLoCK's overview
FACTORED = {
    "commitment": {"weight": 1.0, "reduction": "sum"},
    "reconstruction": {"weight": 1.68, "reduction": "mean"},
    "estimation": {"weight": 1.0, "reduction": "mean"},
    "overview": {"weight": 0.4, "reduction": "mean"},
}


class Task(pl.LightningModule):
    """How the weights of `model` are updated; a subclass says what is minimised and what is measured.

    Args:
        model: with `set_gradient_checkpointing(enabled)` and `no_weight_decay()`.
        optimizer: keywords of `timm.optim.create_optimizer_v2`, and `reference_batch`: the global batch that `lr` is
            meant for (the rate is scaled linearly with the real one), or None.
        schedule: keywords of `timm.scheduler.create_scheduler_v2`, in epochs; stepped after every optimizer step.
        metrics: makes the metrics of validation by name, once for the raw weights and once for the averaged ones.
        auxiliary: for each auxiliary loss that the model returns, its weight and its reduction over layers.
        adaptive_clip: gradients are clipped to this share of the norm of their weight, row by row, see
            `models.tasks.adaptive_clip`; None for not.
        match: settings of `models.tasks.matching.Matching`, of a task that knows them; None for none.
        gradient_checkpointing: recompute blocks in the backward pass.
        compile: run the model through torch.compile; keys of the state dict stay the same.

    Attributes:
        ema_model: set by the EMA callback, and then measured beside the raw weights under names ending in `_ema`.
        final_figures: what was measured after the last step, by name.
        pictures: files that it leaves in the folder of the run.
    """

    pictures: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        optimizer: dict[str, Any],
        schedule: dict[str, Any],
        *,
        metrics: Any,
        auxiliary: dict[str, dict[str, Any]] | None = None,
        adaptive_clip: float | None = None,
        match: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_settings(model, optimizer, schedule)
        for name, how in (auxiliary or {}).items():
            if how["reduction"] not in REDUCTIONS:
                raise UserError(
                    f"task: auxiliary.{name}.reduction must be one of {sorted(REDUCTIONS)}, got {how['reduction']!r}"
                )
        check_clip(adaptive_clip)
        self.model, self.adaptive_clip, self.matching = model, adaptive_clip, matching_of(match, compile)
        self.optimizer, self.schedule, self.auxiliary = dict(optimizer), dict(schedule), auxiliary or {}
        self.metrics = nn.ModuleDict({"raw": metrics(), "ema": metrics()})
        self.ema_model: nn.Module | None = None
        self.final_figures: dict[str, float] = {}
        self._left_out = 0
        self._share = 1.0
        model.set_gradient_checkpointing(gradient_checkpointing)
        self.compiled = compile
        if compile:
            model.compile()

    @property
    def figures(self) -> list[str]:
        """What validation logs: the names that a checkpoint can be chosen by."""
        return [f"val/{name}{suffix}" for suffix in ("", "_ema") for name in self.metrics["raw"]]

    def prepare(self, data: pl.LightningDataModule) -> None:
        """Tells the data what the task needs of it, before anything is started.

        Raises:
            ValueError: the data cannot give it.
        """

    def measure(self, weights: str, model: nn.Module, batch: Any) -> None:
        """Updates `self.metrics[weights]` with what `model` makes of a batch."""
        raise NotImplementedError

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """What the model is called with for a batch of validation."""
        return (batch.images,)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_alone(self.adaptive_clip, self.trainer)
            if self.matching is not None:
                self.matching.spread(self.trainer.strategy)
            self.prepare(self.trainer.datamodule)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._share = share_of(self.trainer, batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Processes with more images than others count for more: their mean is that of all images."""
        super().backward(loss if self._share == 1 else loss * self._share, *args, **kwargs)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.measure("raw", self.model, batch)
            if self.ema_model is not None:
                self.measure("ema", self.ema_model, batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        for weights, suffix in [("raw", ""), ("ema", "_ema")]:
            for name, metric in self.metrics[weights].items():
                if metric.update_called:
                    self.log(f"val/{name}{suffix}", metric.compute(), prog_bar=name == "top1")
                    metric.reset()

    on_test_epoch_end = on_validation_epoch_end

    def on_train_epoch_end(self) -> None:
        """Says how many images `data.on_error=skip` has left out, where it has left out more than before."""
        left_out = getattr(self.trainer.datamodule, "skipped", 0)
        if left_out > self._left_out:
            self._left_out = left_out
            said = f"{left_out} unreadable images were left out so far (data.on_error=skip), see skipped.csv"
            print(f"epoch {self.current_epoch + 1}: {said}")
            if self.trainer.is_global_zero:
                rows = self.trainer.datamodule.skipped_images()
                attempt("skipped.csv", _write_skipped, Path(self.trainer.default_root_dir, "skipped.csv"), rows)

    def auxiliary_loss(self, losses: dict[str, Tensor], batch_size: int) -> Tensor | float:
        """The weighted sum of the losses that layers returned, each (L,); logged one by one without their weights."""
        total: Tensor | float = 0.0
        for name, layers_L in losses.items():
            value, weight = self._auxiliary(name, layers_L)
            self.log(f"train/{name}", value.detach(), batch_size=batch_size)
            total = total + weight * value
        return total

    def matched(self, predict: Predict, batch_size: int) -> tuple[Tensor | None, dict[str, Tensor], Tensor]:
        """Prediction and auxiliary losses of the model, and the weighted sum of what it does not match, also logged."""
        prediction, losses, terms = self.matching(self.model, predict)
        for name, value in terms.items():
            self.log(f"train/match_{name}", value.detach(), batch_size=batch_size)
        total = self.matching.total(terms)
        if prediction is None:
            self.log("train/loss", total.detach(), prog_bar=True, batch_size=batch_size)
        return prediction, losses, total

    def configure_optimizers(self) -> dict[str, Any]:
        total = self.trainer.estimated_stepping_batches
        if total < 1 or not math.isfinite(total):
            raise UserError(
                f"task: the run has {total} optimizer steps; set trainer.max_epochs or trainer.max_steps to 1 or more"
            )
        settings = dict(self.optimizer)
        if reference := settings.pop("reference_batch", None):
            settings["lr"] = scaled_rate(
                settings["lr"], reference, images_per_step(self.trainer, self.trainer.datamodule)
            )
        optimizer = self.build_optimizer(settings)
        self.trainer.fit_loop.setup_data()  # a run that is limited by its steps alone has not asked for data yet
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        schedule = Schedule(optimizer, self.schedule, int(total), per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *given: Any, **named: Any) -> None:
        """By the norms of weights where that is asked for, else as the trainer does."""
        if self.adaptive_clip is None:
            super().configure_gradient_clipping(optimizer, *given, **named)
        else:
            clip(optimizer, self.adaptive_clip)

    def build_optimizer(self, settings: dict[str, Any]) -> torch.optim.Optimizer:
        """The optimizer of the model's weights, from keywords of timm's."""
        return _optimizer(self.model, settings)

    def on_train_start(self) -> None:
        # a checkpoint brings the rate of its own schedule; a run that was made longer has another one
        self.lr_schedulers().step_update(self.trainer.global_step)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.trainer.global_step)

    def _auxiliary(self, name: str, layers_L: Tensor) -> tuple[Tensor, float]:
        how = self.auxiliary.get(name, FACTORED.get(name))
        if how is None:
            raise UserError(
                f"task: the model returns the auxiliary loss {name!r}, which has no weight; "
                f"set +task.auxiliary.{name}='{{weight: 0.01, reduction: mean}}'"
            )
        return REDUCTIONS[how["reduction"]](layers_L), how["weight"]


def _write_skipped(path: Path, rows: list[tuple[str, str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("image", "class", "reason"), *rows])
    put(path, text.getvalue())


def _optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, **{key: value for key, value in settings.items() if value is not None})


def _check_settings(model: nn.Module, optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
    """Finds wrong settings before anything is started, by making an optimizer and throwing it away.

    Raises:
        ValueError: an unknown optimizer or schedule, an unknown key, or a value of a wrong type or range.
    """
    for name in ("lr", "reference_batch", "weight_decay", "layer_decay"):
        if optimizer.get(name) is not None:
            check_number("optimizer", name, optimizer[name])
    check_schedule(schedule)
    if optimizer:
        try:
            _optimizer(model, {key: value for key, value in optimizer.items() if key != "reference_batch"})
        except (TypeError, ValueError, AssertionError) as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            why = f"it has no setting {unknown[1]!r}; leave optimizer.{unknown[1]} out" if unknown else str(error)
            raise UserError(f"optimizer: timm cannot make it with opt={optimizer.get('opt')}: {why}") from error
