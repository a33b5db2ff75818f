"""Tensors of a checkpoint that several processes have written: `model-00001-of-00002.safetensors` and so on.

A name that stands in several of these files is one tensor, whose parts are joined along the first dimension in the
order of the files; every other tensor stands in one of them.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from models.checkpoints.format.door import CorruptCheckpoint, Head, read_head, read_tensors

if TYPE_CHECKING:
    from torch import Tensor


def part_name(name: str, rank: int, world: int) -> str:
    """The file of a process for what one process alone would write to the file `name`."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{rank + 1:05d}-of-{world:05d}.{suffix}"


def parts_of(files: Iterable[str], name: str) -> list[str]:
    """The files of those listed that hold what belongs to `name`: that one, or its parts in order; [] for none."""
    files = list(files)
    if name in files:
        return [name]
    stem, _, suffix = name.rpartition(".")
    pattern = re.compile(rf"{re.escape(stem)}-(\d{{5}})-of-(\d{{5}})\.{suffix}")
    return sorted(file for file in files if pattern.fullmatch(file))


def has(folder: Path, name: str) -> bool:
    """Whether a checkpoint directory holds what belongs to `name`."""
    return bool(parts_of((path.name for path in folder.iterdir()), name))


def read_parts(
    folder: Path, files: Iterable[str], name: str, wanted: Callable[[str], bool] | None = None
) -> "dict[str, Tensor]":
    """The tensors that belong to `name` in a checkpoint directory, which lists these files.

    Args:
        folder: of the checkpoint.
        files: in it.
        name: as one process alone would call the file.
        wanted: whether a tensor is read; default all.

    Raises:
        CorruptCheckpoint: there is no such file, one cannot be read, or parts do not fit each other.
    """
    parts = [read_tensors(folder / part, wanted) for part in parts_of(files, name) or [name]]
    if len(parts) == 1:
        return parts[0]
    import torch

    joined: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        pieces = [part[key] for part in parts if key in part]
        try:
            joined[key] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        except (RuntimeError, TypeError) as error:
            raise CorruptCheckpoint(f"checkpoint: the parts of {key} in {folder} do not fit: {error}") from error
    return joined


def heads_of(folder: Path, files: Iterable[str]) -> list[Head]:
    """The head of each of these files."""
    return [read_head(folder / file) for file in files]


def read_heads(folder: Path, name: str) -> Head:
    """The head that one file with all the tensors of `name` would have."""
    heads = heads_of(folder, parts_of((path.name for path in folder.iterdir()), name) or [name])
    shapes: dict[str, tuple[int, ...]] = {}
    for head in heads:
        for key, shape in head.shapes.items():
            first = shapes[key][0] if key in shapes else 0
            shapes[key] = (first + shape[0], *shape[1:]) if key in shapes else shape
    kinds = {key: kind for head in heads for key, kind in head.kinds.items()}
    return heads[0]._replace(shapes=shapes, kinds=kinds)
