"""The one door for files of checkpoints, whoever sent them: ordinary files of their folder, read as data or refused.

A link that leads out of the folder is not followed; a pipe or a device is not waited for; JSON has a size and a depth,
tensors a head that is looked at before anything is made of them. Whatever is wrong is one sentence with the path.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.errors import UserError
from conf.files import contents, inside, opened
from conf.folders import printable

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    from torch import Tensor

# A trainer.json of a thousand-layer model has about 1 MB; the limit keeps a hostile file from filling the memory.
MAX_JSON_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_DIGITS = 100  # of a whole number; the largest of ours are states of generators


class CorruptCheckpoint(UserError):
    """A checkpoint directory that is unfinished or whose content is not what was written."""


class Head(NamedTuple):
    """What the head of a safetensors file says: shapes and types of its tensors, and the text beside them."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    kinds: dict[str, str]  # F32 and so on

    @property
    def numbers(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def checked(path: Path) -> Path:
    """The path, of an ordinary file in its folder.

    Raises:
        CorruptCheckpoint: there is none, it is something else, or it leads out of the folder.
    """
    try:
        return inside(path.parent, path.name)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> Any:
    """What a JSON file of a checkpoint holds.

    Raises:
        CorruptCheckpoint: it cannot be read, is no JSON, too large or too deep.
    """
    checked(path)
    try:
        found = json.loads(contents(path, MAX_JSON_BYTES), parse_int=_whole)
    except UserError as error:
        raise CorruptCheckpoint(f"checkpoint: {error}") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, numbers of 200 digits
        raise _unreadable(path, error) from error
    if _deeper(found, MAX_DEPTH):
        raise CorruptCheckpoint(f"checkpoint: {printable(path)} is nested deeper than {MAX_DEPTH} levels; {_AGAIN}")
    return found


def read_tensors(path: Path, wanted: Callable[[str], bool] | None = None) -> "dict[str, Tensor]":
    """The tensors of a safetensors file of a checkpoint.

    Args:
        path: of the file.
        wanted: whether a tensor is read; default all.

    Raises:
        CorruptCheckpoint: it cannot be read, or is no such file.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    head = read_head(checked(path))
    try:
        if wanted is None:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in head.shapes if wanted(name)}
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, and what a type that this PyTorch has not ends in
        raise _unreadable(path, error) from error


def read_head(path: Path) -> Head:
    """The head of a safetensors file: eight bytes with the length of a JSON, and that.

    Raises:
        CorruptCheckpoint: it cannot be read, or is no such file.
    """
    try:
        with opened(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise ValueError(f"its head has {length} bytes")
            return _head(json.loads(file.read(length)))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error, "is no safetensors file") from error


def _head(found: dict[str, Any]) -> Head:
    metadata = found.pop("__metadata__", None) or {}
    shapes = {name: tuple(entry["shape"]) for name, entry in found.items()}
    if not all(type(side) is int and side >= 0 for shape in shapes.values() for side in shape):
        raise ValueError("shapes must be whole numbers")
    kinds = {name: str(entry["dtype"]) for name, entry in found.items()}
    return Head(shapes, {str(key): str(value) for key, value in metadata.items()}, kinds)


def _whole(text: str) -> int:
    """A number of more bits than any of ours has would be computed with for ever, or be too large for a float."""
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings stand in each other more often, without a call for each level."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [part for node in layer for part in _parts(node)]
    return bool(layer)


def _parts(node: Any) -> Iterator[Any]:
    return iter(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())


_AGAIN = "fetch it again, or use another checkpoint"


def _unreadable(path: Path, error: BaseException, what: str = "cannot be read") -> CorruptCheckpoint:
    reason = " ".join(str(error).split())[:200]
    return CorruptCheckpoint(f"checkpoint: {printable(path)} {what}, got {type(error).__name__}: {reason}; {_AGAIN}")
