"""What a user's images show: the classes of each, a table, and a page to look at.

Shapes: B = batch, N = images, K = classes, T = best ones.
"""

from collections import Counter
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from conf.values import whole
from models.probes import Report, Subject
from models.probes.drawing.pages import thumbnails as page_of

SHOWN = 5  # unreadable files, and classes, that are named on the terminal


class Guesses(Metric):
    """The best classes of every image, over batches and processes; with `several` each may be true by itself."""

    full_state_update = False
    fields = ("indices", "unreadable", "classes", "probabilities")

    def __init__(self, top: int, several: bool) -> None:
        super().__init__()
        self.top, self.several = top, several
        for name in self.fields:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits_BK: Tensor, indices_B: Tensor, unreadable_B: Tensor) -> None:
        probabilities_BK = logits_BK.sigmoid() if self.several else logits_BK.softmax(-1)
        probabilities_BT, classes_BT = probabilities_BK.topk(self.top)
        for name, values in zip(self.fields, (indices_B, unreadable_B, classes_BT, probabilities_BT), strict=True):
            getattr(self, name).append(values)

    def compute(self) -> list[Tensor]:
        """Positions and whether unreadable (N,), classes and probabilities (N, T), in the order of the images."""
        found = [dim_zero_cat(getattr(self, name)).cpu() for name in self.fields]
        order = found[0].argsort()
        return [values[order] for values in found]


class Prediction(pl.LightningModule):
    """A pass over the images; `found` is what `Guesses` has collected."""

    def __init__(self, model: nn.Module, top: int, several: bool) -> None:
        super().__init__()
        self.model, self.guesses = model, Guesses(top, several)
        self.found: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        unreadable_B = self.trainer.datamodule.source.val.unreadable[batch.indices.cpu()]
        with torch.no_grad():
            logits_BK = self.model(batch.images).float()
        self.guesses.update(logits_BK, batch.indices, unreadable_B.to(logits_BK.device))

    def on_validation_epoch_end(self) -> None:
        self.found = self.guesses.compute()


def predict(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    subject: Subject,
    input: Any,
    top: int = 5,
    thumbnails: int = 500,
) -> Report:
    """Classes of the images that `input=` names.

    Args:
        model, trainer, subject: see `models.probes`.
        data: the images, prepared as those of the model's evaluation.
        input: what was asked for.
        top: classes of each image, as many as there are at most.
        thumbnails: images on the page.
    """
    whole("probe", "top", top, fix="set probe.top=5")
    whole("probe", "thumbnails", thumbnails, 0, fix="set probe.thumbnails=500, or 0 for no page")
    several = (subject.config.get("run") or {}).get("task") == "multilabel"
    task = Prediction(model, min(top, data.num_classes), several)
    trainer.validate(task, data, verbose=False)
    split, names = data.source.val, data.class_names
    rows, unreadable = [], []
    for index, failed, classes, probabilities in zip(*(values.tolist() for values in task.found), strict=True):
        if failed:
            unreadable.append({"file": split.files[index], "reason": split.trouble(index, data.form)})
        else:
            rows.append(_row(split.files[index], [names[i] for i in classes], probabilities))
    counts = Counter(row["class"] for row in rows)
    tables = {"predictions": rows} | ({"unreadable": unreadable} if unreadable else {})
    told = _told(counts, unreadable)
    return Report(
        {"images": len(rows), "unreadable": len(unreadable)} | {f"class/{name}": n for name, n in counts.most_common()},
        rows={},
        tables=tables,
        pages={"predictions": page_of(subject.title, told[0], rows, thumbnails)} if thumbnails else {},
        lines=[subject.title, *told],
    )


def _row(file: str, classes: list[str], probabilities: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"file": file}
    for number, (name, probability) in enumerate(zip(classes, probabilities, strict=True), start=1):
        place = "" if number == 1 else f"_{number}"
        row |= {f"class{place}": name, f"probability{place}": round(probability, 6)}
    return row


def _told(counts: Counter, unreadable: list[dict[str, str]]) -> list[str]:
    """ "120 images: 71 circle, 49 square; 3 unreadable", and those."""
    times = " × " if any(name[:1].isdigit() for name in counts) else " "
    common = [f"{count}{times}{name}" for name, count in counts.most_common(SHOWN)]
    more = f" and {len(counts) - SHOWN} more classes" if len(counts) > SHOWN else ""
    total = sum(counts.values())
    line = f"{total} image{'s' * (total != 1)}: {', '.join(common)}{more}" if total else "no image that can be read"
    if not unreadable:
        return [line]
    listed = [f"  unreadable: {entry['file']} ({entry['reason']})" for entry in unreadable[:SHOWN]]
    return [f"{line}; {len(unreadable)} unreadable (unreadable.csv)", *listed]
