"""Writes weights: one file of them, or a checkpoint directory of a run (`write_checkpoint`)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoints.format.codec import plain_tensor
from models.checkpoints.format.disk import sync
from models.checkpoints.format.tensors import save_tensors
from models.checkpoints.format.write import write_checkpoint

__all__ = ["write_checkpoint", "write_weights"]


def write_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A new `.safetensors` file, or a `.pth` with the weights below `model`.

    It is written under a hidden name beside the target, flushed to the disk, then renamed.

    Args:
        metadata: text that a `.safetensors` file keeps beside the weights.

    Raises:
        OSError: it could not be written; nothing of it remains.
    """
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
    state = {name: plain_tensor(value, name) for name, value in state.items()}
    try:
        temporary.unlink(missing_ok=True)  # of a killed process of the same number
        if path.suffix == ".pth":
            torch.save({"model": state}, temporary)
            sync(temporary)
        else:
            save_tensors(state, temporary, {"format": "pt", **(metadata or {})})
        os.rename(temporary, path)
        sync(path.parent)
    except RuntimeError as error:  # of a full disk, in the words of torch
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
