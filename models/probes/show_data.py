"""A picture of what a model is shown: training images as they are augmented and mixed, and validation images."""

from itertools import islice
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from conf.errors import UserError
from conf.values import whole
from data.batch import Batch
from data.dataset import collate_carried, delivered
from data.order.sampler import Draw
from models.probes import Report
from models.probes.charts import sheet

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
    samples = data.val_dataloader().dataset
    places = np.unique(np.linspace(0, len(samples) - 1, count).round().astype(int))
    read = samples.__getitems__([Draw(0, int(index)) for index in places])
    return data._stage(delivered(collate_carried(read)), training=False)


def pictures(data: Any, batch: Batch, classes: list[str], count: int) -> list[tuple[np.ndarray, str]]:
    """Images as they can be shown, each with its label in words."""
    shown = visible(batch.images[:count], data.mean, data.std)
    return [(image, in_words(label, classes)) for image, label in zip(shown, batch.labels[:count], strict=True)]


def visible(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> list[np.ndarray]:
    """(H, W, 3) or (H, W) from 0 to 1: normalisation undone; of other numbers of channels the first three, or one.

    Values beyond 0 … 1, of float images and of erased rectangles, are cut off unless all of the image lies outside.
    """
    shape = (1, -1, 1, 1)
    pixels = images.float() * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    found = []
    for image in pixels.permute(0, 2, 3, 1).cpu().numpy():
        low, high = float(image.min()), float(image.max())
        if high <= 0 or low >= 1 or high > 10:
            image = (image - low) / max(high - low, 1e-12)
        found.append(image.clip(0, 1).squeeze(-1) if image.shape[-1] == 1 else image.clip(0, 1))
    return found


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
