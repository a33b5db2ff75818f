"""How well a model finds all labels of the validation images: mean average precision and F1, class by class."""

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score

from models.probes import Report
from models.probes.reading.forward_cost import forward_cost, rows_of_cost
from models.tasks.multilabel import MultiLabel


class Measured(MultiLabel):
    """Validation of the raw weights that also keeps the figures of every class."""

    def __init__(self, model: nn.Module, ema: nn.Module | None, num_classes: int) -> None:
        super().__init__(model, {}, {}, num_classes)
        self.ema_model = ema
        plain = {"num_labels": num_classes, "average": None, "validate_args": False}
        self.of_classes = nn.ModuleDict(
            {"precision": MultilabelAveragePrecision(**plain), "f1": MultilabelF1Score(**plain)}
        )
        self.found: dict[str, list[float]] = {}

    def measure(self, weights: str, model: nn.Module, batch: Any) -> Tensor:
        logits = super().measure(weights, model, batch)
        if weights == "raw":
            for metric in self.of_classes.values():
                metric.update(logits.sigmoid(), batch.labels.long())
        return logits

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.found = {name: metric.compute().tolist() for name, metric in self.of_classes.items()}


def multilabel(model: nn.Module, ema: nn.Module | None, data: pl.LightningDataModule, trainer: pl.Trainer) -> Report:
    """mAP, F1 and loss of the raw and of the averaged weights, a table of the classes, and what a pass costs."""
    task = Measured(model, ema, data.num_classes)
    task.prepare(data)
    figures: dict[str, Any] = dict(trainer.validate(task, data, verbose=False)[0])
    figures |= forward_cost(model, data, trainer)
    images, support = len(data.source.val), data.source.val.labels.sum(0).tolist()
    table = [
        {"class": name, "average_precision": precision, "f1": f1, "images": count}
        for name, precision, f1, count in zip(
            data.class_names, task.found["precision"], task.found["f1"], support, strict=True
        )
    ]
    return Report(
        figures,
        rows=_rows(figures) | rows_of_cost(figures),
        tables={"classes": table},
        score=figures["val/map"],
        measured=(images if trainer.limit_val_batches == 1.0 else 0, images),
    )


def _rows(figures: dict[str, Any]) -> dict[str, str]:
    words = {"map": "mean average precision", "f1": "F1, mean of classes", "loss": "loss"}
    return {
        f"{word}{', EMA' * bool(suffix)}": f"{value:.4f}" if name == "loss" else f"{value:.2%}"
        for suffix in ("", "_ema")
        for name, word in words.items()
        if (value := figures.get(f"val/{name}{suffix}")) is not None
    }
