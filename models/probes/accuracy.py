"""How well a classifier does on the validation data, and what it costs."""

from typing import Any

import pytorch_lightning as pl
from torch import nn

from models.probes import Report, Subject
from models.probes.forward_cost import forward_cost, rows_of_cost
from models.tasks.classification import Classification


def accuracy(
    model: nn.Module, ema: nn.Module | None, data: pl.LightningDataModule, trainer: pl.Trainer, subject: Subject
) -> Report:
    """Top-1, top-5 and loss of the raw and of the averaged weights; parameters, multiply-adds and images per second."""
    task = Classification(model, {}, {}, data.num_classes)
    task.prepare(data)
    task.ema_model = ema
    figures: dict[str, Any] = dict(trainer.validate(task, data, verbose=False)[0])
    figures |= forward_cost(model, data, trainer)
    images = len(data.source.val)
    return Report(
        figures,
        rows=_rows(figures) | rows_of_cost(figures),
        score=figures["val/top1"],
        measured=(images if trainer.limit_val_batches == 1.0 else 0, images),
    )


def _rows(figures: dict[str, Any]) -> dict[str, str]:
    names = {"val/top1": "top-1", "val/top5": "top-5", "val/loss": "loss"}
    rows = {
        f"{label}{', EMA' * bool(s)}": figures[k + s]
        for s in ("", "_ema")
        for k, label in names.items()
        if k + s in figures
    }
    return {key: f"{v:.4f}" if "loss" in key else f"{v:.2%}" for key, v in rows.items()}
