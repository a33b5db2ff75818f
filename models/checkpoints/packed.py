"""The configuration that exported weights carry: in a safetensors file, or beside one as on Hugging Face's hub.

Torch-free. It is data from a file: `check_config` it before use.
"""

import json
import os
from pathlib import Path
from typing import Any

from conf.errors import UserError
from models.checkpoints.format.config import legible
from models.checkpoints.format.door import CorruptCheckpoint, read_head, read_json
from models.checkpoints.hub import CONFIG, fetch

KEYS = ("run", "seed", "image_size", "attention", "model", "augment", "data")


def config_of(path: str | os.PathLike) -> dict[str, Any] | None:
    """The configuration of weights of ours that are no checkpoint directory; None for those of others.

    Args:
        path: a file, a folder as the hub has them, or a name of the hub; see `models.checkpoints.load_weights`.

    Raises:
        UserError: the hub has nothing under that name.
    """
    file = fetch(path)
    if not file.is_file():
        return None
    for found in (_within(file), _beside(file)):
        if isinstance(found, dict) and found.keys() >= {*KEYS} and isinstance(found["run"], dict):
            return legible(found)
    return None


def _within(file: Path) -> Any:
    """What the text in the head of a safetensors file says."""
    if file.suffix != ".safetensors":
        return None
    try:
        text = read_head(file.resolve()).metadata.get("config", "")
    except CorruptCheckpoint as error:
        raise UserError(f"load_weights: not a valid safetensors file, got {file}: {error}; fetch it again") from error
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _beside(file: Path) -> Any:
    """What the `config.json` in its folder says."""
    try:
        return read_json(file.with_name(CONFIG))
    except (CorruptCheckpoint, OSError):
        return None
