"""Samples of a finished model on disk: the picture, and the file that the suites for FID read.

Source: the evaluation suite of Dhariwal & Nichol, NeurIPS 2021, arXiv:2105.05233 (guided-diffusion/evaluations), with
which the figures of DiT and MoH-DiT were measured: an .npz whose `arr_0` holds uint8 images (n, H, W, 3).
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from conf.errors import UserError
from conf.places import numbered, writable
from models.diffusion.samples import PICTURE
from models.tasks.generation import Generation

FILE = "samples.npz"


def check_samples(count: Any) -> None:
    """Refuses what is no number of samples.

    Raises:
        ValueError: naming the setting.
    """
    if count is not None and (type(count) is not int or count < 1):
        raise UserError(
            f"eval: samples must be a whole number of at least 1, or null for no file, got {count!r}; "
            "set samples=50000, for instance"
        )


def show_samples(
    task: Generation, data: pl.LightningDataModule, folder: Path, count: int | None, device: torch.device
) -> dict[str, Any]:
    """Writes the picture, and a file of `count` samples of the averaged weights (the raw ones without an average).

    Classes come in turn, as many of each as the number allows.

    Returns:
        The score of the samples, where there is one, and the path of the file.
    """
    folder = _place(folder)
    models = {"": task.model} | ({"_ema": task.ema_model} if task.ema_model is not None else {})
    for model in models.values():
        model.to(device)  # where a trainer that has finished leaves nothing
    figures: dict[str, Any] = task.studio.show(models, data, str(folder))
    print(f"picture: {folder / PICTURE} ({task.studio.sampling})")
    if count is not None:
        model = list(models.values())[-1]
        figures["samples"] = str(write_samples(task, model, count, data.num_classes, folder / FILE))
        print(
            f"samples: {folder / FILE}, {count} images as the ADM evaluation suite reads them; FID is not computed here"
        )
    return figures


def _place(folder: Path) -> Path:
    """The folder, or one in it that has no samples yet."""
    place, said = writable(folder)
    for line in said:
        print(line)
    taken = any(os.path.lexists(place / name) for name in (FILE, PICTURE))  # a link that leads nowhere, too
    found = next(path for path in numbered(place / "samples") if not os.path.lexists(path)) if taken else place
    found.mkdir(exist_ok=True)
    return found


def write_samples(task: Generation, model: nn.Module, count: int, num_classes: int, path: Path) -> Path:
    """`count` samples of a model as `arr_0`, uint8 (n, H, W, 3)."""
    labels = [number % num_classes for number in range(count)]
    images, done = None, 0
    for batch in task.studio.draw(model, labels):
        part = batch.permute(0, 2, 3, 1).numpy()
        images = np.empty((count, *part.shape[1:]), np.uint8) if images is None else images
        images[done : done + len(part)] = part
        done += len(part)
    np.savez(path, arr_0=images)
    return path
