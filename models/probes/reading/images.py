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
from data.sources.pictures import PictureSplit

CHARTS = ("deletion", "plane")  # pictures that a report may have besides those of images


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
    places = list(range(min(count, len(split)))) if own else data.spread(count)
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
    """Names of files without folder and ending; those that are there twice, or that a chart has, get a number."""
    stems = [re.sub(r"[^\w.-]+", "_", name.rpartition("/")[2].rpartition(".")[0] or name) for name in names]
    return [f"{stem}-{i}" if stem in CHARTS or stems.index(stem) != i else stem for i, stem in enumerate(stems)]


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
