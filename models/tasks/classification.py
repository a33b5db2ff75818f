"""Image classification: what is minimised, what is measured, and how the weights are updated.

Shapes: B = batch, K = classes, L = layers that return an auxiliary loss, H W C = map of the last stage.
"""

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from models.tasks.effective_batch import images_per_step, scaled_rate
from models.tasks.schedule import Schedule, check_number, check_schedule
from models.tasks.token_labelling import TokenHead, prepare

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
        check_number("task", "token_weight", token_weight)
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
            raise ValueError(f"optimizer: timm cannot make it from {optimizer}: {error}; see conf/optimizer") from error


def _metrics(num_classes: int) -> nn.ModuleDict:
    fast = {"average": "micro", "validate_args": False}  # checks of values would wait for the device at every batch
    return nn.ModuleDict(
        {
            "top1": MulticlassAccuracy(num_classes, top_k=1, **fast),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), **fast),
            "loss": MeanMetric(nan_strategy="disable"),
        }
    )
