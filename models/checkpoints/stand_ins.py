"""Inert stand-ins for what authors pickle beside their weights: argument namespaces, configurations, NumPy numbers.

Torch's weights-only loader refuses a file with any object that is not a tensor or plain data. Here objects of a few
known kinds become empty `Settings`, so that the weights next to them can be read: nothing of the real class is
imported, called or kept. Everything else stays refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_KNOWN = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|collections\.defaultdict|pathlib\.\w*Path|numpy\..*|_codecs\.encode|"
    r"(yacs|omegaconf|easydict|addict|mmcv|mmengine|fvcore|typing|timm|enum)\..*)"
)


class Settings(dict):
    """Takes every call, item and state of the object whose place it has, and keeps nothing."""

    def __new__(cls, *args: Any, **keywords: Any) -> "Settings":
        return super().__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignored."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignored."""

    def append(self, item: Any) -> None:
        """Ignored."""

    def extend(self, items: Any) -> None:
        """Ignored."""


def stand_ins(path: Path) -> Iterator[tuple[type, str]]:
    """What `torch.serialization.safe_globals` needs for a file: a class of its own for each known kind of object."""
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (ValueError, RuntimeError, OSError, KeyError, EOFError):  # loading it will say what is wrong
        return
    for name in wanted:
        if _KNOWN.fullmatch(name):
            yield type("Settings", (Settings,), {}), name
