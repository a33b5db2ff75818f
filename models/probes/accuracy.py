"""How well a classifier does on the validation data, class by class and image by image, and what it costs."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import Tensor, nn

from models.probes import Report, Subject
from models.probes.reading.forward_cost import forward_cost, rows_of_cost
from models.probes.reading.outcomes import (
    Found,
    Outcomes,
    chart_of_confusion,
    chart_of_reliability,
    confusions,
    figures_of,
    table_of_classes,
    table_of_images,
)
from models.tasks.classification import Classification

PERCENT = {"top1": "top-1", "top5": "top-5", "f1_macro": "F1, mean of classes", "ece": "calibration error"}
TOP5_FROM = 6  # classes: of five the five best are all


class Measured(Classification):
    """Validation that also keeps what was made of every image: `found`, by weights."""

    def __init__(self, model: nn.Module, ema: nn.Module | None, num_classes: int) -> None:
        super().__init__(model, {}, {}, num_classes)
        self.ema_model = ema
        self.outcomes = nn.ModuleDict({"raw": Outcomes()} | ({"ema": Outcomes()} if ema is not None else {}))
        self.found: dict[str, Found] = {}

    def measure(self, weights: str, model: nn.Module, batch: Any) -> Tensor:
        logits = super().measure(weights, model, batch)
        self.outcomes[weights].update(logits, batch.labels, batch.indices)
        return logits

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.found = {weights: outcomes.compute() for weights, outcomes in self.outcomes.items()}


def accuracy(
    model: nn.Module,
    ema: nn.Module | None,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    subject: Subject,
    images: bool = True,
    charts: bool = True,
) -> Report:
    """Top-1, top-5, loss, F1 and calibration of the raw and of the averaged weights; parameters, FLOPs, images/s.

    Args:
        model, ema, data, trainer, subject: see `models.probes`.
        images: a table of all images too.
        charts: pictures of confusion and reliability too.
    """
    task = Measured(model, ema, data.num_classes)
    task.prepare(data)
    figures: dict[str, Any] = dict(trainer.validate(task, data, verbose=False)[0])
    for weights, found in task.found.items():
        of_all = figures_of(found, data.num_classes)
        figures |= {f"val/{name}{'_ema' * (weights == 'ema')}": value for name, value in of_all.items()}
    figures |= forward_cost(model, data, trainer)
    found = task.found[subject.weights if subject.weights in task.found else "raw"]
    names, count = _names(data), len(data.source.val)
    tables = {"classes": table_of_classes(found, names)}
    if images:
        tables["images"] = table_of_images(found, names, _files(data.source.val))
    return Report(
        figures,
        rows=_rows(figures, data.num_classes) | rows_of_cost(figures),
        tables=tables,
        pictures=charts_of(found, names, figures["val/ece"]) if charts else {},
        lines=[*_warnings(data, names), *filter(None, [confusions(found, names)])],
        score=figures["val/top1"],
        measured=(count if trainer.limit_val_batches == 1.0 else 0, count),
    )


def charts_of(found: Found, names: list[str], error: float) -> dict[str, Any]:
    """By the names of their files."""
    return {"confusion": chart_of_confusion(found, names), "reliability": chart_of_reliability(found, error)}


def _names(data: pl.LightningDataModule) -> list[str]:
    """Of all classes of the model; a data set may name fewer."""
    names = list(map(str, data.class_names))
    return names + [f"class {label}" for label in range(len(names), data.num_classes)]


def _files(split: Any) -> list[str]:
    """What the images are called: their files, else their numbers."""
    path = getattr(split, "relative_path", str)
    return [path(index) for index in range(len(split))]


def _warnings(data: pl.LightningDataModule, names: list[str]) -> list[str]:
    present = np.unique(np.asarray(data.source.val.labels))
    if len(present) > 1 or len(names) == 1:
        return []
    return [f"warning: all images are of one class, {names[present[0]]}: a model that always says so would be perfect"]


def _rows(figures: dict[str, Any], num_classes: int) -> dict[str, str]:
    rows = {}
    for suffix, told in (("", ""), ("_ema", ", EMA")):
        for name, label in (PERCENT | {"loss": "loss"}).items():
            if f"val/{name}{suffix}" in figures and (name != "top5" or num_classes >= TOP5_FROM):
                value = figures[f"val/{name}{suffix}"]
                rows[f"{label}{told}"] = f"{value:.4f}" if name == "loss" else f"{value:.2%}"
    return rows
