"""What is known of a run before its first step, for tables and loggers: what its model costs, which data it sees."""

import hashlib
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import nn

from models.backbones.base import pair
from models.cost import multiply_adds, parameters


def facts_of(model: nn.Module, data: pl.LightningDataModule) -> dict[str, Any]:
    """Parameters, multiply-adds of one image (None where they cannot be counted) and a fingerprint of the data."""
    return {
        "parameters": parameters(model),
        "flops": count(model, pair(data.image_size)),
        "data_fingerprint": fingerprint(data),
    }


def count(model: nn.Module, image_size: tuple[int, int]) -> int | None:
    """Multiply-adds of one image; a run does not end for a figure of its table."""
    try:
        return multiply_adds(model, image_size)
    except Exception:
        return None


def fingerprint(data: pl.LightningDataModule) -> str:
    """Twelve letters that change with the classes, the number of images or any label; pixels are not read."""
    found = hashlib.sha256("\0".join(data.class_names).encode())
    for split in (data.source.train, data.source.val):
        labels = getattr(split, "labels", None)
        found.update(str(len(split)).encode())
        found.update(b"" if labels is None else np.ascontiguousarray(labels).tobytes())
    return found.hexdigest()[:12]
