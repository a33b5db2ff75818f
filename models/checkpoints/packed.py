"""The configuration that exported weights carry: in a safetensors file, or beside one as on Hugging Face's hub.

Torch-free. It is data from a file: `check_config` it before use.
"""

import json
import os
from pathlib import Path
from typing import Any

from conf.errors import UserError
from models.checkpoints.format.directory import MAX_JSON_BYTES
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
    for text in (_within(file), _beside(file)):
        try:
            config = json.loads(text) if text else None
        except (ValueError, RecursionError):
            continue
        if isinstance(config, dict) and config.keys() >= {*KEYS} and isinstance(config["run"], dict):
            return config
    return None


def _within(file: Path) -> str | bytes:
    """The text in the head of a safetensors file: eight bytes with the length of a JSON, and that."""
    if file.suffix != ".safetensors":
        return b""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            head = json.loads(opened.read(length)) if length <= MAX_JSON_BYTES else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"load_weights: not a valid safetensors file, got {file}: {error}; fetch it again") from error
    metadata = head.get("__metadata__") if isinstance(head, dict) else None
    return metadata.get("config", "") if isinstance(metadata, dict) else ""


def _beside(file: Path) -> bytes:
    config = file.with_name(CONFIG)
    return config.read_bytes() if config.is_file() and config.stat().st_size <= MAX_JSON_BYTES else b""
