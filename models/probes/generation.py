"""How well a model generates: its loss, what a recogniser makes of its samples, a picture and a file of them."""

from typing import Any

import pytorch_lightning as pl
from torch import nn

from conf.errors import UserError
from models.probes import Report, Subject
from models.probes.reading.forward_cost import forward_cost, rows_of_cost
from models.probes.reading.sample_files import check_samples, show_samples
from models.tasks.generation import Generation

NAMES = {"val/recognised": "recognised", "val/loss": "loss"}


def generation(
    model: nn.Module, ema: nn.Module | None, data: pl.LightningDataModule, trainer: pl.Trainer, subject: Subject
) -> Report:
    """The loss of the raw and of the averaged weights, samples, and what a pass costs.

    Raises:
        UserError: the model generates nothing, or settings of the samples that it cannot take.
    """
    given = subject.config
    if "samples" not in given:
        raise UserError("eval: probe=generation needs a model that generates images; leave probe= out")
    check_samples(given["samples"])
    task = Generation(model, {}, {}, data.num_classes, **given["task"])
    task.prepare(data)
    task.ema_model = ema
    figures: dict[str, Any] = dict(trainer.validate(task, data, verbose=False)[0])
    figures |= forward_cost(model, data, trainer)
    if trainer.is_global_zero:
        with trainer.precision_plugin.forward_context():
            figures |= show_samples(task, data, subject.path.parent, given["samples"], trainer.strategy.root_device)
    images = len(data.source.val)
    return Report(
        figures,
        rows=_rows(figures) | rows_of_cost(figures),
        score=figures["val/loss"],
        measured=(images if trainer.limit_val_batches == 1.0 else 0, images),
    )


def _rows(figures: dict[str, Any]) -> dict[str, str]:
    rows = {
        f"{label}{', EMA' * bool(s)}": figures[k + s]
        for s in ("", "_ema")
        for k, label in NAMES.items()
        if k + s in figures
    }
    if "val/recogniser_top1" in figures:
        rows["recogniser, of real images"] = figures["val/recogniser_top1"]
    return {key: f"{v:.4f}" if "loss" in key else f"{v:.2%}" for key, v in rows.items()}
