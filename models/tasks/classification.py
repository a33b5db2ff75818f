"""Image classification: what is minimised and what is measured.

Shapes: B = batch, K = classes, L = layers that return an auxiliary loss, H W C = map of the last stage.
"""

from collections.abc import Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from conf.errors import UserError
from models.tasks.base import Task
from models.tasks.distillation import distillation_of, has_two_heads, with_both_heads
from models.tasks.fit import check_fits, check_outputs
from models.tasks.multilabel import check_labels
from models.tasks.objective import check_loss, check_weights, class_weights, loss_of
from models.tasks.schedule import check_number
from models.tasks.supervision import check_alone, is_supervised, with_overview
from models.tasks.token_labelling import TokenHead, prepare, width_of, with_tokens


class Classification(Task):
    """Cross entropy on hard (B,) or soft (B, K) targets; top-1, top-5 (of more than five classes) and loss on the
    validation data.

    Args:
        model: `model(images, return_losses=True) -> (logits (B, K), {name: (L,)})`; one whose `learns_from_labels` is
            true is also given `labels`.
        optimizer, schedule, auxiliary, adaptive_clip, gradient_checkpointing, compile: see `models.tasks.base.Task`.
        num_classes: K.
        label_smoothing: share of the target that is spread evenly over the classes, in [0, 1).
        token_weight: of the loss on token labels (`models.tasks.token_labelling`), which the data must then have; 0
            for none. The model then has `forward_tokens` and `classify_with_losses`, see
            `models.backbones.base.Backbone`.
        loss: `ce`, or `bce` for a binary cross entropy per class; the loss of validation is the cross entropy.
        class_weights: in the loss of training, a number per class; `auto`: in inverse proportion to the images of a
            class. None: all the same.
        distillation: `hard` or `soft`, from a teacher (`models.tasks.distillation`); None for none.
        teacher, teacher_weights: its name for `models.create_model`, and its file.
        distillation_weight, temperature: share of the loss on what it says; of `soft`.
        match: what the layers of another model did is to be matched (`models.tasks.matching`); None for none.

    Raises:
        ValueError: a setting out of range, or a model that generates images instead of naming their class.
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
        loss: str = "ce",
        class_weights: str | Sequence[float] | None = None,
        distillation: str | None = None,
        teacher: str | None = None,
        teacher_weights: str | None = None,
        distillation_weight: float = 0.5,
        temperature: float = 3.0,
        match: dict[str, Any] | None = None,
        adaptive_clip: float | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        if getattr(model, "generates", False):
            raise UserError(
                f"task: classification needs a model that names the class of an image, got {type(model).__name__}, "
                "which generates images; set task=generation, or choose another model"
            )
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task: label_smoothing must be in [0, 1), got {label_smoothing}; set task.label_smoothing")
        check_number("task", "token_weight", token_weight)
        check_outputs(model, num_classes)
        check_loss(loss)
        check_weights(class_weights, num_classes)
        taught = distillation_of(distillation, teacher, teacher_weights, distillation_weight, temperature)
        if taught is not None and token_weight > 0:
            raise UserError(
                f"task: a model learns from token labels or from a teacher, got token_weight={token_weight} beside "
                f"distillation={distillation}; set task.token_weight=0 or task.distillation=null"
            )
        if match is not None and (taught is not None or token_weight > 0):
            raise UserError(
                f"task: a model matches another one by itself, got task.match beside token_weight={token_weight} and "
                f"distillation={distillation}; set task.token_weight=0 task.distillation=null"
            )
        check_alone(model, **{"token labelling": token_weight > 0, "matching": match is not None})
        two_heads = taught is not None and has_two_heads(model)
        shared = {"auxiliary": auxiliary, "adaptive_clip": adaptive_clip, "match": match, "compile": compile}
        shared["gradient_checkpointing"] = gradient_checkpointing
        super().__init__(model, optimizer, schedule, metrics=partial(_metrics, num_classes), **shared)
        self.label_smoothing, self.token_weight = label_smoothing, token_weight
        self.loss, self.given_weights, self.num_classes = loss, class_weights, num_classes
        self.register_buffer("class_weights", None, persistent=False)
        self.with_labels = getattr(model, "learns_from_labels", False)
        self.token_head = TokenHead(width_of(model), num_classes) if token_weight > 0 else None
        self.distillation, self.two_heads = taught, two_heads
        self.supervised = is_supervised(model)
        # `model.compile` is about `model(images)` alone
        self.with_tokens = torch.compile(with_tokens) if compile else with_tokens
        self.with_both_heads = torch.compile(with_both_heads) if compile else with_both_heads
        self.with_overview = torch.compile(with_overview) if compile else with_overview

    def prepare(self, data: pl.LightningDataModule) -> None:
        check_fits(self.model, data)
        if getattr(data, "source", None) is not None:
            check_labels(data.source.val.labels, several=False)
        if self.given_weights is not None and self.model.training:
            labels = np.asarray(data.source.train.labels)
            self.class_weights = class_weights(self.given_weights, labels, self.num_classes).to(self.device)
        prepare(data, self.token_weight, self.model)
        if self.distillation is not None and self.model.training:
            self.distillation.prepare(data, self.num_classes)
        if self.matching is not None and self.model.training:
            self.matching.prepare(self.model, data, self.num_classes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = {"labels": batch.labels} if self.with_labels else {}
        if self.token_head is not None:
            logits, losses, tokens_BHWC = self.with_tokens(self.model, batch.images, **labels)
        elif self.two_heads:
            logits, for_teacher, losses = self.with_both_heads(self.model, batch.images, **labels)
        elif self.matching is not None:
            predict = methodcaller("__call__", batch.images, return_losses=True, **labels)
            logits, losses, apart = self.matched(predict, len(batch.images))
            if logits is None:
                return apart
        elif self.supervised:
            logits, losses, of_overview = self.with_overview(self.model, batch.images, **labels)
            losses = losses | {"overview": self._of_labels(of_overview, batch.labels).unsqueeze(0)}
            for_teacher = logits
        else:
            logits, losses = self.model(batch.images, return_losses=True, **labels)
            for_teacher = logits
        loss = self._of_labels(logits, batch.labels)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.images))
        if self.token_head is not None:
            of_tokens = self.token_head.loss(tokens_BHWC, batch.token_labels, self.label_smoothing)
            self.log("train/token_loss", of_tokens.detach(), batch_size=len(batch.images))
            loss = loss + self.token_weight * of_tokens
        if self.distillation is not None:
            of_teacher = self.distillation.loss(for_teacher.float(), batch.images)
            self.log("train/distillation_loss", of_teacher.detach(), batch_size=len(batch.images))
            loss = self.distillation.with_labels(loss, of_teacher)
        if self.matching is not None:
            loss = self.matching.own * loss + apart
        return loss + self.auxiliary_loss(losses, len(batch.images))

    def _of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is minimised of logits."""
        return loss_of(logits.float(), labels, self.loss, self.label_smoothing, self.class_weights)

    def measure(self, weights: str, model: nn.Module, batch: Any) -> Tensor:
        """Gives the logits (B, K) back."""
        logits = model(batch.images).float()
        metrics = self.metrics[weights]
        metrics["loss"].update(F.cross_entropy(logits, batch.labels, reduction="none"))
        for name in ("top1", "top5"):
            if name in metrics:
                metrics[name].update(logits, batch.labels)
        return logits

    def build_optimizer(self, settings: dict[str, Any]) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(settings)
        if self.token_head is not None:
            self.token_head.join(optimizer, settings.get("weight_decay") or 0.0)
        return optimizer


def _metrics(num_classes: int) -> nn.ModuleDict:
    fast = {"average": "micro", "validate_args": False}  # checks of values would wait for the device at every batch
    top5 = {"top5": MulticlassAccuracy(num_classes, top_k=5, **fast)} if num_classes > 5 else {}  # else it is always 1
    top1 = MulticlassAccuracy(num_classes, top_k=1, **fast)
    return nn.ModuleDict({"top1": top1, **top5, "loss": MeanMetric(nan_strategy="disable")})
