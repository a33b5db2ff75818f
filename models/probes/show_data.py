"""A picture of what a model is shown: training images as they are augmented and mixed, and validation images."""

from itertools import islice
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import Tensor

from conf.errors import UserError
from conf.values import whole
from data.batch import Batch
from models.probes import Report
from models.probes.drawing.charts import sheet
from models.probes.reading.images import visible

SHARE = 0.01  # of a mixed label, from which it is written
NAME = 18  # letters of a class


def show_data(data: pl.LightningDataModule, images: int = 16, batches: int = 1) -> Report:
    """The first images of the first training batches of epoch 0, and some of validation.

    Args:
        data: the images.
        images: so many of training, and half as many of validation.
        batches: that the training images are taken from.
    """
    whole("show_data", "images", images, fix="set probe.images")
    whole("show_data", "batches", batches, fix="set probe.batches")
    classes, rows = list(map(str, data.class_names)), []
    training = _training(data, batches)
    if training:
        each = -(-images // len(training))
        shown = [pair for batch in training for pair in pictures(data, batch, classes, each)]
        rows.append(("training, as the model sees it", shown[:images]))
    half = max(1, images // 2)
    rows.append(("validation", pictures(data, _validation(data, half), classes, half)))
    figures = {"images_train": len(rows[0][1]) if training else 0, "images_val": len(rows[-1][1])}
    mixed = bool(training) and training[0].labels.ndim == 2 and data.augment.mixes
    lines = ["shares of mixed labels are written below the images"] if mixed else []
    return Report(figures, pictures={"batches": sheet(rows)}, lines=lines)


def _training(data: pl.LightningDataModule, batches: int) -> list[Batch]:
    """Batches behind the device stage; none where there is nothing to train on."""
    try:
        data.batch_size = min(data.batch_size, len(data.source.train))  # or there might be no full batch
        loader = data.train_dataloader()
    except (UserError, OSError):
        return []
    return [data._stage(b._replace(token_labels=None), training=True) for b in islice(iter(loader), batches)]


def _validation(data: pl.LightningDataModule, count: int) -> Batch:
    """Images spread over the split, which often comes class by class."""
    return data.evaluated(data.spread(count))


def pictures(data: Any, batch: Batch, classes: list[str], count: int) -> list[tuple[np.ndarray, str]]:
    """Images as they can be shown, each with its label in words."""
    shown = visible(batch.images[:count], data.mean, data.std)
    return [(image, in_words(label, classes)) for image, label in zip(shown, batch.labels[:count], strict=True)]


def in_words(label: Tensor, classes: list[str]) -> str:
    """ "cat", of a mixed one "cat 70 %, dog 30 %" on two lines, of several labels all of them."""
    if label.ndim == 0:
        return _short(classes[int(label)])
    parts = sorted(((float(share), classes[i]) for i, share in enumerate(label) if share >= SHARE), reverse=True)
    if all(share == 1 for share, _ in parts):
        return "\n".join(_short(name) for _, name in parts[:3]) or "(none)"
    return "\n".join(f"{_short(name)} {share:.0%}" for share, name in parts[:3])


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"
