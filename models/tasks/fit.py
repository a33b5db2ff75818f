"""Whether a model and the data that it shall be trained or measured on go together, found before a run is started."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from conf.errors import UserError
from data.place import readers
from models.cost import example_inputs, image_channels

FEW = "Expected more than 1 value per channel"  # what torch says of a batch norm that has one value


def check_fits(model: nn.Module, data: Any) -> None:
    """Compares channels and classes; of a model in training mode also whether it can train on the smallest batch.

    Raises:
        ValueError: naming both settings.
    """
    channels, given = image_channels(model), getattr(data, "channels", 3)
    if channels != given:
        raise UserError(
            f"task: the model takes images of {channels} channel(s), the data has {given}; set "
            f"model.in_channels={given} (or leave it out: it follows the data), or data.channels={channels}"
        )
    if model.training and hasattr(data, "smallest_batch"):
        _check_smallest_batch(model, data)


def check_outputs(model: nn.Module, num_classes: int) -> None:
    """Refuses a model for another number of classes than the data has.

    Raises:
        ValueError: naming both numbers.
    """
    outputs = getattr(model, "num_classes", num_classes)
    if outputs != num_classes:
        raise UserError(
            f"task: the model names one of {outputs} classes, the data has {num_classes}; set "
            f"model.num_classes={num_classes}, or leave it out: it follows the data"
        )


def _check_smallest_batch(model: nn.Module, data: Any) -> None:
    """A batch norm that has one value per channel cannot train: a batch of one image, where the map is one cell."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    world = readers(data.trainer)
    if data.smallest_batch(world) > 1 or _trains_on_one(model, data):
        return
    images, whole = len(data.source.train), data.batch_size * world
    remedy = "data.batch_size=2 or more" if data.batch_size == 1 else "data.drop_last=true, or another data.batch_size"
    raise UserError(
        f"task: batch norm of {type(model).__name__} cannot train on a single image of this size, got {images} images "
        f"in batches of {whole}, of which the smallest has one per process; set {remedy}"
    )


def _trains_on_one(model: nn.Module, data: Any) -> bool:
    """Tries it on a copy."""
    size = data.image_size if isinstance(data.image_size, tuple) else (data.image_size, data.image_size)
    copy = deepcopy(model)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            copy(*example_inputs(copy, size))
    except ValueError as error:
        if str(error).startswith(FEW):
            return False
        raise
    return True
