"""Images that may have several labels: a binary cross entropy per class, mean average precision and F1.

Shapes: B = batch, K = classes.
"""

from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score

from conf.errors import UserError
from models.tasks.base import Task
from models.tasks.fit import check_fits, check_outputs
from models.tasks.objective import check_weights
from models.tasks.supervision import check_alone


class MultiLabel(Task):
    """Binary cross entropy on targets (B, K); mAP, F1 at a probability of one half and loss on the validation data.

    Args:
        model: `model(images, return_losses=True) -> (logits (B, K), {name: (L,)})`.
        optimizer, schedule, auxiliary, gradient_checkpointing, compile: see `models.tasks.base.Task`.
        num_classes: K.
        class_weights: of the images that have a label, one number per class; `auto`: how many times more images lack
            it than have it. None: none.

    Raises:
        ValueError: a setting out of range, or a model for other classes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: dict[str, Any],
        schedule: dict[str, Any],
        num_classes: int,
        *,
        class_weights: Any = None,
        auxiliary: dict[str, dict[str, Any]] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        if getattr(model, "generates", False) or getattr(model, "learns_from_labels", False):
            raise UserError(
                f"task: multilabel needs a model that gives one logit per class and is not given labels, got "
                f"{type(model).__name__}; choose another model, pool or task"
            )
        check_alone(model, multilabel=True)
        check_outputs(model, num_classes)
        check_weights(class_weights, num_classes)
        shared = {"auxiliary": auxiliary, "gradient_checkpointing": gradient_checkpointing, "compile": compile}
        super().__init__(model, optimizer, schedule, metrics=partial(_metrics, num_classes), **shared)
        self.given_weights = class_weights
        self.register_buffer("positive_weights", None, persistent=False)

    def prepare(self, data: pl.LightningDataModule) -> None:
        check_fits(self.model, data)
        check_labels(data.source.val.labels, several=True)
        if self.given_weights is not None and self.model.training:
            weights = positive_weights(self.given_weights, np.asarray(data.source.train.labels))
            self.positive_weights = weights.to(self.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, losses = self.model(batch.images, return_losses=True)
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.labels, pos_weight=self.positive_weights)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.images))
        return loss + self.auxiliary_loss(losses, len(batch.images))

    def measure(self, weights: str, model: nn.Module, batch: Any) -> Tensor:
        """Gives the logits (B, K) back."""
        logits = model(batch.images).float()
        metrics, labels = self.metrics[weights], batch.labels.long()
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        metrics["loss"].update(loss.mean(1))
        metrics["map"].update(logits.sigmoid(), labels)
        metrics["f1"].update(logits.sigmoid(), labels)
        return logits


def check_labels(labels: Any, several: bool) -> None:
    """Refuses images with several labels for a task of one, and the reverse.

    Raises:
        ValueError: naming the task to choose.
    """
    if (np.ndim(labels) == 2) == several:
        return
    has, task = ("one label", "classification") if several else ("several labels", "multilabel")
    probe = "accuracy" if several else "multilabel"
    raise UserError(
        f"task: an image of this data has {has}, got the task for the other; train with task={task}, evaluate with "
        f"probe={probe}"
    )


def positive_weights(given: Any, labels: np.ndarray) -> Tensor:
    """Of the labels that images have, (K,); for `auto` the images without a label over those with it."""
    if given != "auto":
        return torch.tensor(list(given), dtype=torch.float32)
    present = labels.sum(0).clip(1)
    return torch.from_numpy((len(labels) - present) / present).float().clamp(min=1 / len(labels))


def _metrics(num_classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "map": MultilabelAveragePrecision(num_classes, average="macro", validate_args=False),
            "f1": MultilabelF1Score(num_classes, average="macro", validate_args=False),
            "loss": MeanMetric(nan_strategy="disable"),
        }
    )
