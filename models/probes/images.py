"""The first images of an evaluation: as a model is given them, and as people see them."""

import re
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from conf.errors import UserError
from conf.values import whole
from data.order.spread import spread_over
from data.sources.pictures import PictureSplit
from models.probes.show_data import visible


class Images(NamedTuple):
    """batch: (B, C, H, W), prepared as in evaluation. shown: in RGB what the model sees of each. names: of files, or
    numbers, each once and fit for a file name. labels: None for images of the user."""

    batch: Tensor
    shown: list[Image.Image]
    names: list[str]
    labels: list[int] | None


def first_images(data: pl.LightningDataModule, count: int, device: torch.device | str = "cpu") -> Images:
    """The first `count` images of the user, or of validation spread over the split, which often comes class by class.

    Raises:
        UserError: a number that is none, or an image of the user that cannot be read.
    """
    whole("probe", "images", count, fix="set probe.images")
    split = data.source.val
    own = isinstance(split, PictureSplit)
    places = list(range(min(count, len(split)))) if own else spread_over(len(split), count)
    batch = data.evaluated(places)
    for index in places if own else ():
        if split.unreadable[index]:
            raise UserError(
                f"input: {split.files[index]} cannot be read ({split.trouble(index, data.form)}); leave it out"
            )
    shown = [_picture(image) for image in visible(batch.images, data.mean, data.std)]
    names = [split.files[i] if own else str(i) for i in places]
    return Images(batch.images.to(device), shown, _told_apart(names), None if own else batch.labels.tolist())


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image * 255).round().astype(np.uint8)).convert("RGB")


def _told_apart(names: list[str]) -> list[str]:
    """Names of files without folder and ending; those that are there twice get a number."""
    stems = [re.sub(r"[^\w.-]+", "_", name.rpartition("/")[2].rpartition(".")[0] or name) for name in names]
    return [stem if stems.index(stem) == i else f"{stem}-{i}" for i, stem in enumerate(stems)]
