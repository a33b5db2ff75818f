"""Saves what every process has a share of: each writes files of its own into one checkpoint directory.

PyTorch's own format of distributed checkpoints has a pickle in it; here the shares are safetensors, and the manifest
is written last by process 0 (`models.checkpoints.format.parts`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.callbacks.directory_io import EMA_KEY, contents_of
from models.callbacks.writer import Writer
from models.checkpoints.format.parts import part_name
from models.checkpoints.format.write import begin, commit, discard, write_tensors


def save(checkpoint: Mapping[str, Any], path: Path, writer: Writer | None) -> None:
    """Writes the directory `path`, on all processes together.

    Args:
        checkpoint: Lightning's mapping, with shares as distributed tensors.
        path: of the directory; one that stands there is replaced.
        writer: told of the bytes when all is written, on process 0.

    Raises:
        OSError: on all processes, where one of them could not write; nothing of the checkpoint remains.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    contents = contents_of(localized(checkpoint) if rank == 0 else shares_of(checkpoint))
    temporary = _together(begin, path) if rank == 0 else _together()
    names = {name: part_name(name, rank, world) for name in contents.tensors}
    written = _attempt(write_tensors, temporary, {names[name]: tensors for name, tensors in contents.tensors.items()})
    entries: list[Any] = [None] * world
    dist.all_gather_object(entries, written)
    failed = [entry for entry in entries if isinstance(entry, OSError)]
    if not failed and rank == 0:
        files = {name: entry for part in entries for name, entry in part.items()}
        done = _attempt(commit, temporary, path, files, contents.plain, contents.manifest)
        failed = [done] if isinstance(done, OSError) else []
    if failed and rank == 0:
        discard(temporary)
    failed = _broadcast(failed)
    if failed:
        raise failed[0]
    if rank == 0 and writer is not None:
        writer.start(lambda: None, sum(entry["bytes"] for part in entries for entry in part.values()))


def localized(value: Any) -> Any:
    """A nested mapping in which shares of this process stand for distributed tensors."""
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, Mapping):
        return {key: localized(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(localized(item) for item in value)
    return value


def shares_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a process other than 0 writes: its shares, and nothing that is whole on all of them."""
    optimizers = [
        {"state": {number: _shares(values) for number, values in state["state"].items()}}
        for state in checkpoint.get("optimizer_states", [])
    ]
    found = {"state_dict": _shares(checkpoint["state_dict"]), "optimizer_states": optimizers}
    if EMA_KEY in checkpoint:
        found[EMA_KEY] = _shares(checkpoint[EMA_KEY])
    return {**found, "global_step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}


def _shares(values: Mapping[str, Any]) -> dict[str, Tensor]:
    local = {name: value.to_local() for name, value in values.items() if isinstance(value, DTensor)}
    return {name: value for name, value in local.items() if value.numel()}


def _together(call: Any = None, *arguments: Any) -> Any:
    """What `call` gives on process 0, on all; an OSError of it is raised on all."""
    found = _broadcast(_attempt(call, *arguments) if call is not None else None)
    if isinstance(found, OSError):
        raise found
    return found


def _attempt(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except OSError as error:
        return OSError(error.errno, error.strerror or str(error))


def _broadcast(value: Any) -> Any:
    """What process 0 has."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
