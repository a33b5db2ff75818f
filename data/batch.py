"""The batch that data modules hand to tasks, and how samples become a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from conf.errors import UserError
from data.order.sampler import Draw


class TokenLabels(NamedTuple):
    """Label maps as they leave the loader. Shapes: `B` images, `K` best classes in each of `h × w` cells.

    `scores` float32 (B, K, h, w) and `classes` int32 (B, K, h, w) are mirrored where the image is.
    `boxes` float32 (B, 4): left, top, right and bottom of what the image shows, as shares of the whole map. One
    sample has the same without `B`.
    """

    scores: Tensor
    classes: Tensor
    boxes: Tensor


class Batch(NamedTuple):
    """What a task receives. Shapes: `B` images of `H × W` pixels.

    `images` come from the loader as uint8 (B, 3, H, W), or with the channels and numbers of another form;
    after the device stage they are float32, normalised, channels_last in memory. `labels` are int64 (B,); after
    mixup or cutmix float32 (B, num_classes), rows summing to 1; of images with several labels float32 (B, num_classes)
    from the start, 1 for each. `indices` int64 (B,) are positions in the source.
    `epoch` is the epoch that the batch belongs to, 0 in evaluation. `number` is the batch's number in its epoch,
    0-based and the same on all ranks; `named` is the number and the rank that it had in the layout that the run began
    with, by which its randomness is named, where this is another one. `token_labels` are `None` without label maps;
    after the device stage float32 (B, rows, columns, num_classes), a distribution for each token of the last map.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int
    number: int
    token_labels: TokenLabels | Tensor | None = None
    named: tuple[int, int] | None = None


class Sample(NamedTuple):
    """One sample that was read: an image (channels, H, W), its label, the draw that asked for it, its label map."""

    image: Tensor
    label: int | np.ndarray
    draw: Draw
    token_labels: TokenLabels | None = None


def collate(samples: Sequence[Sample | None]) -> Batch:
    """Stacks samples into a batch; `None` stands for an unreadable image that `on_error: skip` left out.

    Raises:
        ValueError: all images of the batch were left out: training on nothing is an error, not a smaller batch.
    """
    present = [sample for sample in samples if sample is not None]
    if not present:
        raise UserError(
            f"ImageData: no image of this batch is readable, got {len(samples)} unreadable files; "
            "see the paths reported above and mend or remove the files"
        )
    draw, labelled = present[0].draw, present[0].token_labels is not None
    return Batch(
        images=default_collate([sample.image for sample in present]),
        labels=_labels([sample.label for sample in present]),
        indices=torch.tensor([sample.draw.index for sample in present], dtype=torch.int64),
        epoch=draw.epoch,
        number=draw.number,
        token_labels=default_collate([sample.token_labels for sample in present]) if labelled else None,
        named=draw.named,
    )


def _labels(labels: Sequence[int | np.ndarray]) -> Tensor:
    if np.ndim(labels[0]) == 0:
        return torch.tensor(labels, dtype=torch.int64)
    return torch.from_numpy(np.stack(labels).astype(np.float32))
