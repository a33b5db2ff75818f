"""What is exported: a model with its weights, real inputs for it, and what is known of both."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from conf.settings import resolved
from data.batch import Batch
from models.backbones.base import pair
from models.checkpoints import settings_of
from models.cost import example_inputs
from models.runs.finished import Parts, Weights

MOST = 4  # images that the check needs: one, and three others


class Subject(NamedTuple):
    """A finished model, in evaluation mode.

    inputs: of four, to be cut into batches. names: of the inputs and of the output. config: resolved, of the command.
    weights: what is known of the checkpoint. chosen: "raw" or "ema". classes: their names, [] where nobody knows them.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    names: tuple[tuple[str, ...], str]
    data: pl.LightningDataModule
    config: dict[str, Any]
    weights: Weights
    chosen: str
    classes: list[str]

    @property
    def title(self) -> str:
        return self.weights.title

    @property
    def mechanism(self) -> str:
        """ "swin_tiny with agent attention"."""
        return self.title.partition(" on ")[0].partition(",")[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model is given."""
        return tuple(self.inputs[0].shape[-2:])

    @property
    def settings(self) -> dict[str, Any]:
        """Of `create_model`, with the name of the model."""
        return {"name": self.config["run"]["model"], **settings_of(self.config)}

    def of(self, start: int, count: int) -> tuple[Tensor, ...]:
        """A batch out of the inputs."""
        return tuple(value[start : start + count] for value in self.inputs)

    def larger(self) -> tuple[Tensor, ...]:
        """Two of the inputs, half as high again and twice as wide."""
        images, *others = self.of(0, 2)
        height, width = self.size
        return F.interpolate(images, (height + height // 2, 2 * width), mode="bilinear").contiguous(), *others


def subject_of(cfg: DictConfig) -> Subject:
    """The model and the first images of its validation data.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    given = resolved(cfg)
    parts = Parts(cfg, given)
    made = parts.made(("model", "data", "trainer", "subject"))
    model, data = made["model"], made["data"]
    device = made["trainer"].strategy.root_device
    classes = made["subject"].classes or list(map(str, data.class_names))
    if getattr(model, "generates", False):
        torch.manual_seed(0)
        inputs = example_inputs(model, pair(given["image_size"]), MOST)
        names = ("latents", "timesteps", "labels")[: len(inputs)], "prediction"
    else:
        inputs, names = (first_images(data, device),), (("images",), "logits")
    return Subject(model.to(device), inputs, names, data, given, parts.weights, made["subject"].weights, classes)


def batches(data: pl.LightningDataModule, device: torch.device) -> Iterator[Batch]:
    """The validation data, prepared as an evaluation prepares it."""
    for batch in data.val_dataloader():
        moved = Batch(*(value.to(device) if isinstance(value, Tensor) else value for value in batch))
        yield data.on_after_batch_transfer(moved, 0)


def first_images(data: pl.LightningDataModule, device: torch.device) -> Tensor:
    """Four images of the validation data, repeated where there are fewer."""
    found: list[Tensor] = []
    for batch in batches(data, device):
        found += batch.images
        if len(found) >= MOST:
            break
    cycle = (found * MOST)[:MOST]
    return torch.stack(list(islice(cycle, MOST))).contiguous()
