"""The mean and standard deviation of images that weights were trained with: they belong to the weights.

Our checkpoints have them in their configuration, files of timm in the `config.json` beside them on the hub, and of
timm's `augreg` files it is known that both are 0.5. Torch-free.
"""

import os
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.values import is_number
from models.checkpoints.format.directory import CONFIG, resolve
from models.checkpoints.format.door import read_json
from models.checkpoints.hub import fetch

KEYS = ("mean", "std")
Normalisation = tuple[list[float], list[float]]


def normalisation(path: str | os.PathLike) -> Normalisation | None:
    """Mean and standard deviation per channel, of values between 0 and 1; None where nobody knows, or nothing is there.

    Args:
        path: as for `load_weights`.
    """
    try:
        found = fetch(path)
        folder = found.parent if found.is_file() and found.name not in ("best", "last") else resolve(found)
        config = read_json(folder / CONFIG)
    except (UserError, OSError):
        config = {}
    found = _in(config) if isinstance(config, dict) else None
    if found is None and "augreg" in Path(path).name:
        return [0.5] * 3, [0.5] * 3
    return found


def for_channels(found: Normalisation, channels: int) -> Normalisation | None:
    """The same for images of another number of channels: for one the average; None for others."""
    if len(found[0]) == channels:
        return found
    mean, std = ([sum(values) / len(values)] for values in found)
    return (mean, std) if channels == 1 else None


def _in(config: dict[str, Any]) -> Normalisation | None:
    """Those in a configuration of ours, or of timm; None for values that are none."""
    nodes = (config.get(key) for key in ("data", "pretrained_cfg"))
    for node in (node for node in nodes if isinstance(node, dict)):
        values = [node.get(key) for key in KEYS]
        listed = all(isinstance(v, list) and v and all(map(is_number, v)) for v in values)
        if listed and len(values[0]) == len(values[1]) and min(values[1]) > 0:
            return list(map(float, values[0])), list(map(float, values[1]))
    return None
