"""Inert stand-ins for what authors pickle beside their weights: argument namespaces, configurations, NumPy numbers.

Torch's weights-only loader refuses a file with any object that is not a tensor or plain data. Here objects of a few
known kinds become empty `Settings`, and mappings of known kinds plain ones, so that the weights next to them can be
read: nothing of the real class is imported or called. Everything else stays refused.
"""

import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KNOWN = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|collections\.defaultdict|pathlib\.(\w+\.)?\w*Path|numpy\..*|"
    r"builtins\.(bool|bytes|dict|float|frozenset|int|list|range|slice|str|tuple)|"
    r"functools\.partial|torch\.(optim|nn\.modules|torch_version)\..*|dataclasses\..*|"
    r"(yacs|omegaconf|easydict|addict|mmcv|mmengine|fvcore|typing|timm|enum|ml_collections|hydra|lightning|"
    r"pytorch_lightning|lightning_fabric|lightning_utilities|torchmetrics|torchvision|transformers|ignite)\..*)"
)
# Subclasses of dict, which a pickle fills item by item.
_MAPPINGS = ("defaultdict", "CfgNode", "EasyDict", "Dict", "ConfigDict")


class Settings:
    """Takes the place of an object: every call and every state is accepted, and nothing is kept."""

    def __new__(cls, *args: Any, **keywords: Any) -> "Settings":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignored."""


class Items:
    """Takes the place of a subclass of dict: making one gives a plain mapping, the only kind that torch fills."""

    def __new__(cls, *args: Any) -> OrderedDict:
        return OrderedDict()


def stand_ins(path: Path) -> Iterator[tuple[type, str]]:
    """What `torch.serialization.safe_globals` needs for a file: a stand-in and the full name that it stands for.

    Broken files get none.
    """
    import torch

    try:
        if zipfile.is_zipfile(path):
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        else:
            wanted = _of_old_file(path)
    except Exception:  # whatever bytes of strangers bring about here: loading them will say what is wrong
        return
    for name in wanted:
        if _KNOWN.fullmatch(name):
            yield (Items if name.rpartition(".")[2] in _MAPPINGS else Settings), name


def _of_old_file(path: Path) -> set[str]:
    """The names of all objects in a file of torch before 1.6: four pickles, of which the last is the content."""
    with path.open("rb") as file:
        return {
            argument.replace(" ", ".")
            for _ in range(4)
            for operation, argument, _ in pickletools.genops(file)
            if operation.name == "GLOBAL"
        }
