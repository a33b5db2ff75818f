"""A pass over the validation data: each batch, prepared as in evaluation, goes to whoever looks at it."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import nn

from conf.errors import UserError
from conf.values import whole
from data.batch import Batch


def over_validation(
    who: str,
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    look: Callable[[Batch], None],
    images: int | None = None,
) -> int:
    """Hands batches on the device of the trainer to `look`, in its precision and without gradients.

    Args:
        who: names the probe.
        model: put on that device.
        data, trainer: see `models.probes`.
        look: is given each batch, in the order of the data.
        images: at most so many, spread over the data, which often come class by class; None for all.

    Returns:
        How many images there were.

    Raises:
        UserError: a number that is none, a model that takes no images, or several devices.
    """
    check_images(who, images)
    if getattr(model, "generates", False):
        raise UserError(f"{who}: {type(model).__name__} generates images, so it is shown none; choose another model")
    if trainer.world_size > 1:
        raise UserError(f"{who}: one device is needed, got {trainer.world_size}; set trainer.devices=1")
    if images is not None and images < len(data.source.val):
        data = _some(data, images)
    listener = _Listener(model, look)
    trainer.validate(listener, data, verbose=False)
    model.to(trainer.strategy.root_device)  # where a trainer that has finished leaves nothing
    return listener.seen


def check_images(who: str, images: Any) -> None:
    """Refuses what is no number of images; None is one."""
    if images is not None:
        whole(who, "images", images, what="a whole number of at least 1, or null for all", fix="set probe.images=500")


def _some(data: pl.LightningDataModule, count: int) -> pl.LightningDataModule:
    """The same data with so many images for validation, evenly spread."""

    def val_dataloader() -> Any:
        loader = data.val_dataloader()
        whole = len(data.source.val)
        loader.batch_sampler.indices = np.linspace(0, whole - 1, count).round().astype(int).tolist()
        return loader

    seen = copy.copy(data)
    seen.val_dataloader = val_dataloader
    return seen


class _Listener(pl.LightningModule):
    def __init__(self, model: nn.Module, look: Callable[[Batch], None]) -> None:
        super().__init__()
        self.model, self.look, self.seen = model, look, 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.look(batch)
        self.seen += len(batch.images)
