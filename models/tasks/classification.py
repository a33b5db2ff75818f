"""Image classification: what is minimised, what is measured, and how the weights are updated.

Shapes: B = batch, K = classes, L = layers that return an auxiliary loss, H W C = map of the last stage.
"""

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from models.tasks.effective_batch import images_per_step, scaled_rate
from models.tasks.token_labelling import TokenHead, prepare

SCHEDULES = ("cosine", "constant", "step", "poly")
INTERVALS = ("step", "epoch")
EPOCHS = ("warmup_epochs", "cooldown_epochs", "decay_epochs", "late_epochs")  # settings of a schedule
REDUCTIONS = {"mean": Tensor.mean, "sum": Tensor.sum}


class Classification(pl.LightningModule):
    """Cross entropy on hard (B,) or soft (B, K) targets; top-1, top-5 and loss on the validation data.

    Args:
        model: `model(images, return_losses=True) -> (logits (B, K), {name: (L,)})`.
        optimizer: keywords of `timm.optim.create_optimizer_v2`, and `reference_batch`: the global batch that `lr` is
            meant for (the rate is scaled linearly with the real one), or None.
        schedule: keywords of `timm.scheduler.create_scheduler_v2`, in epochs; stepped after every optimizer step.
        num_classes: K.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1).
        auxiliary: for each auxiliary loss that the model returns, its weight and its reduction over layers.
        token_weight: of the loss on token labels (`models.tasks.token_labelling`), which the data must then have; 0
            for none. The model then gives `model(images, return_tokens=True) -> (logits, losses, tokens (B, H, W, C))`.
        gradient_checkpointing: recompute blocks in the backward pass.
        compile: run the model through torch.compile; keys of the state dict stay the same.

    The EMA callback sets `ema_model`; it is then evaluated beside the raw weights under names ending in `_ema`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: dict[str, Any],
        schedule: dict[str, Any],
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        auxiliary: dict[str, dict[str, Any]] | None = None,
        token_weight: float = 0.0,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"task: label_smoothing must be in [0, 1), got {label_smoothing}; set task.label_smoothing"
            )
        _check_number("task", "token_weight", token_weight)
        _check_settings(model, optimizer, schedule)
        for name, how in (auxiliary or {}).items():
            if how["reduction"] not in REDUCTIONS:
                raise ValueError(
                    f"task: auxiliary.{name}.reduction must be one of {sorted(REDUCTIONS)}, got {how['reduction']!r}"
                )
        self.model = model
        self.optimizer, self.schedule = dict(optimizer), dict(schedule)
        self.label_smoothing, self.auxiliary = label_smoothing, auxiliary or {}
        self.token_weight = token_weight
        self.token_head = TokenHead(model.channels[-1], num_classes) if token_weight > 0 else None
        self.metrics = nn.ModuleDict({"raw": _metrics(num_classes), "ema": _metrics(num_classes)})
        self.ema_model: nn.Module | None = None
        model.set_gradient_checkpointing(gradient_checkpointing)
        self.compiled = compile
        if compile:
            model.compile()

    @property
    def figures(self) -> list[str]:
        """What validation logs: the names that a checkpoint can be chosen by."""
        return [f"val/{name}{suffix}" for suffix in ("", "_ema") for name in self.metrics["raw"]]

    def setup(self, stage: str) -> None:
        if stage == "fit":
            prepare(self.trainer.datamodule, self.token_weight, self.model)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.token_head is None:
            logits, losses = self.model(batch.images, return_losses=True)
        else:
            logits, losses, tokens_BHWC = self.model(batch.images, return_tokens=True)
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.images))
        if self.token_head is not None:
            of_tokens = self.token_head.loss(tokens_BHWC, batch.token_labels, self.label_smoothing)
            self.log("train/token_loss", of_tokens.detach(), batch_size=len(batch.images))
            loss = loss + self.token_weight * of_tokens
        for name, layers_L in losses.items():
            value, weight = self._auxiliary(name, layers_L)
            self.log(f"train/{name}", value.detach(), batch_size=len(batch.images))
            loss = loss + weight * value
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._measure("raw", self.model, batch)
        if self.ema_model is not None:
            self._measure("ema", self.ema_model, batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        for weights, suffix in [("raw", ""), ("ema", "_ema")]:
            for name, metric in self.metrics[weights].items():
                if metric.update_called:
                    self.log(f"val/{name}{suffix}", metric.compute(), prog_bar=name == "top1")
                    metric.reset()

    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> dict[str, Any]:
        total = self.trainer.estimated_stepping_batches
        if total < 1 or not math.isfinite(total):
            raise ValueError(
                f"task: the run has {total} optimizer steps; set trainer.max_epochs or trainer.max_steps to 1 or more"
            )
        settings = dict(self.optimizer)
        if reference := settings.pop("reference_batch", None):
            settings["lr"] = scaled_rate(
                settings["lr"], reference, images_per_step(self.trainer, self.trainer.datamodule)
            )
        optimizer = _optimizer(self.model, settings)
        if self.token_head is not None:
            self.token_head.join(optimizer, settings.get("weight_decay") or 0.0)
        self.trainer.fit_loop.setup_data()  # a run that is limited by its steps alone has not asked for data yet
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        schedule = Schedule(optimizer, self.schedule, int(total), per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        # a checkpoint brings the rate of its own schedule; a run that was made longer has another one
        self.lr_schedulers().step_update(self.trainer.global_step)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.trainer.global_step)

    def _auxiliary(self, name: str, layers_L: Tensor) -> tuple[Tensor, float]:
        if name not in self.auxiliary:
            raise ValueError(
                f"task: the model returns the auxiliary loss {name!r}, which has no weight; "
                f"set +task.auxiliary.{name}='{{weight: 0.01, reduction: mean}}'"
            )
        how = self.auxiliary[name]
        return REDUCTIONS[how["reduction"]](layers_L), how["weight"]

    @torch.no_grad()
    def _measure(self, weights: str, model: nn.Module, batch: Any) -> None:
        logits = model(batch.images).float()
        metrics = self.metrics[weights]
        metrics["loss"].update(F.cross_entropy(logits, batch.labels, reduction="none"))
        metrics["top1"].update(logits, batch.labels)
        metrics["top5"].update(logits, batch.labels)


class Schedule:
    """A timm schedule as a function of the optimizer step alone: nothing of it is kept in checkpoints.

    Args:
        optimizer: with the learning rate to reach after the warm-up.
        settings: `sched`, `warmup_epochs`, `warmup_lr`, `min_lr`, `cooldown_epochs` and more, see conf/schedule.
            `interval`: "step", or "epoch" for one rate throughout an epoch. `late_epochs`: the schedule begins that
            much later, holds its first value until then, and is cut off at the end; it is 1 for authors whose code
            calls timm's `step(epoch)` after the epoch of that number.
        total: steps of the run.
        per_epoch: steps of an epoch.

    The warm-up, and before it what the schedule is late, take at most half of the run, so that a short trial reaches
    its learning rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: dict[str, Any], total: int, per_epoch: int) -> None:
        self.optimizer = optimizer
        options = {key: value for key, value in settings.items() if value is not None}
        self.every = per_epoch if options.pop("interval", "step") == "epoch" else 1
        total, epoch = math.ceil(total / self.every), per_epoch // self.every  # both in what timm counts
        cooldown = round(options.pop("cooldown_epochs", 0) * epoch)
        warmup = min(round(options.pop("warmup_epochs", 0) * epoch), total // 2)
        self.late = min(round(options.pop("late_epochs", 0) * epoch), total // 2 - warmup)
        if "decay_epochs" in options:
            options["decay_epochs"] = max(round(options["decay_epochs"] * epoch), 1)
        if options.get("sched") == "constant":
            options |= {"sched": "cosine", "min_lr": max(group["lr"] for group in optimizer.param_groups)}
        self.timm, _ = create_scheduler_v2(
            optimizer,
            num_epochs=max(total - cooldown, 1),
            warmup_epochs=warmup,
            cooldown_epochs=cooldown,
            updates_per_epoch=1,
            step_on_epochs=False,
            **options,
        )

    def step_update(self, step: int) -> None:
        """Sets the learning rates of the given optimizer step, 0-based."""
        self.timm.step_update(max(step // self.every - self.late, 0))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the step decides."""


def _optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, **{key: value for key, value in settings.items() if value is not None})


def _check_settings(model: nn.Module, optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
    """Finds wrong settings before anything is started, by making an optimizer and throwing it away.

    Raises:
        ValueError: an unknown optimizer or schedule, an unknown key, or a value of a wrong type or range.
    """
    for group, settings, names in [
        ("optimizer", optimizer, ("lr", "reference_batch", "weight_decay", "layer_decay")),
        ("schedule", schedule, (*EPOCHS, "warmup_lr", "min_lr")),
    ]:
        for name in names:
            if settings.get(name) is not None:
                _check_number(group, name, settings[name])
    if schedule.get("sched", "cosine") not in SCHEDULES:
        raise ValueError(f"schedule: sched must be one of {', '.join(SCHEDULES)}, got {schedule['sched']!r}")
    _check_interval(schedule)
    if optimizer:
        try:
            _optimizer(model, {key: value for key, value in optimizer.items() if key != "reference_batch"})
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"optimizer: timm cannot make it from {optimizer}: {error}; see conf/optimizer") from error


def _check_interval(schedule: dict[str, Any]) -> None:
    interval = schedule.get("interval", "step")
    if interval not in INTERVALS:
        raise ValueError(
            f"schedule: interval must be one of {', '.join(INTERVALS)}, got {interval!r}; set schedule.interval"
        )
    for name in EPOCHS if interval == "epoch" else ():
        if (schedule.get(name) or 0) % 1:
            raise ValueError(
                f"schedule: {name} must be a whole number where the rate changes once per epoch, "
                f"got {schedule[name]!r}; set schedule.{name}, or schedule.interval=step"
            )


def _check_number(group: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{group}: {name} must be a number of at least 0, got {value!r}; set {group}.{name}")


def _metrics(num_classes: int) -> nn.ModuleDict:
    fast = {"average": "micro", "validate_args": False}  # checks of values would wait for the device at every batch
    return nn.ModuleDict(
        {
            "top1": MulticlassAccuracy(num_classes, top_k=1, **fast),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), **fast),
            "loss": MeanMetric(nan_strategy="disable"),
        }
    )
