"""What a classifier minimises: cross entropy or a binary one per class, with weights of classes.

Source: binary cross entropy for ImageNet, Wightman et al., "ResNet strikes back", arXiv 2110.00476.

Shapes: B = batch, K = classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import UserError
from conf.values import is_number

LOSSES = ("ce", "bce")


def loss_of(logits_BK: Tensor, labels: Tensor, kind: str, smoothing: float, weights_K: Tensor | None) -> Tensor:
    """The mean over the batch; of `bce` over the classes too, as in timm.

    Args:
        logits_BK: float32.
        labels: of classes (B,), or a distribution over them (B, K).
        kind: one of `LOSSES`.
        smoothing: share of the target that is spread evenly over the classes.
        weights_K: of the classes; None for the same for all.
    """
    if kind == "ce":
        return F.cross_entropy(logits_BK, labels, weight=weights_K, label_smoothing=smoothing)
    classes = logits_BK.shape[1]
    target_BK = F.one_hot(labels, classes).to(logits_BK.dtype) if labels.ndim == 1 else labels
    target_BK = target_BK * (1 - smoothing) + smoothing / classes
    return F.binary_cross_entropy_with_logits(logits_BK, target_BK, weight=weights_K)


def check_loss(kind: Any) -> None:
    if kind not in LOSSES:
        raise UserError(f"task: loss must be {' or '.join(LOSSES)}, got {kind!r}; set task.loss")


def check_weights(given: Any, num_classes: int) -> None:
    """Raises `ValueError` unless it is None, `auto` or a positive number per class."""
    if given is None or (isinstance(given, str) and given == "auto"):
        return
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    if not listed or len(given) != num_classes or not all(is_number(w) and w > 0 for w in given):
        raise UserError(
            f"task: class_weights must be auto or {num_classes} positive numbers, one per class, got {given!r}; "
            "set task.class_weights"
        )


def class_weights(given: str | Sequence[float] | None, labels: np.ndarray, num_classes: int) -> Tensor | None:
    """As given, or for `auto` in inverse proportion to the images of a class: images / (classes * images of it).

    A class without images has the weight of one with one image.

    Args:
        labels: of the training images, (images,).
    """
    if given is None:
        return None
    if given != "auto":
        return torch.tensor(list(given), dtype=torch.float32)
    counts = np.bincount(labels, minlength=num_classes).clip(1)
    return torch.from_numpy(len(labels) / (num_classes * counts)).float()
