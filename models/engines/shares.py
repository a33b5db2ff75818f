"""Checkpoints of shares: PyTorch's distributed checkpoint, with safetensors in our directories and no pickle.

Every process writes its shares beside training, from copies in the memory of the host; the manifest with the digests of
all files is written last, by process 0. Every process reads the slices that it has a share of, whoever wrote them.
PyTorch makes a file in memory before it writes it, one after the other of weights, averages and optimizer.

Source: `torch.distributed.checkpoint`, whose files of HuggingFace's kind these are (`HuggingFaceStorageWriter`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from models.callbacks.directory_io import Contents, contents_of, state_of
from models.callbacks.snapshot import Snapshot
from models.callbacks.writer import Writer
from models.checkpoints.format.directory import TENSORS, resolve, verify
from models.checkpoints.format.door import CorruptCheckpoint
from models.checkpoints.format.parts import part_name, parts_of, read_heads, read_parts
from models.checkpoints.format.tensors import TYPES
from models.checkpoints.format.write import begin, commit, discard, link, write_tensors
from models.engines.pieces import PartReader, PartWriter, Piece, PiecePlanner

PATIENCE = timedelta(hours=1)  # of writers, on slow storage; who is dead closes its connection at once

_OF_WEIGHTS = re.compile(r"optimizer_states\.\d+\.state\.")


class Stored(NamedTuple):
    """A checkpoint directory, verified, and the files that its manifest lists."""

    folder: Path
    files: list[str]

    @classmethod
    def at(cls, path: str | Path) -> "Stored":
        folder = resolve(path)
        return cls(folder, list(verify(folder)["files"]))

    def state(self) -> dict[str, Any]:
        """Lightning's mapping; tensors of which there may be shares have their shape and type alone."""
        return state_of(self.folder, outlines)


class Shares:
    """Saves and loads on all processes together; what it says to them never waits for a device."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._snapshot = Snapshot()
        self._written: tuple[Path, dict[str, dict[str, Any]]] | None = None  # what stands on the disk of the snapshots

    def save(self, checkpoint: dict[str, Any], path: Path, writer: Writer | None) -> None:
        """Writes the directory `path`.

        Args:
            checkpoint: Lightning's mapping, with shares as distributed tensors.
            path: of the directory; one that stands there is replaced.
            writer: writes beside training, and reports an OSError later, on all processes; without it everything is on
                the disk when this returns.

        Raises:
            OSError: on all processes, where one of them could not write; nothing of the checkpoint remains.
        """
        contents = contents_of(checkpoint)
        mine = {file: dict(_mine(tensors)) for file, tensors in contents.tensors.items()}
        local = {file: {name: _local(value) for name, value in values.items()} for file, values in mine.items()}
        standing = self._written[1] if self._written is not None and self._written[0] == path else {}
        changed = self._snapshot.take(local, compare=bool(standing))
        pieces = {
            file: {name: Piece.of(value, self._snapshot.content[file][name]) for name, value in values.items()}
            for file, values in mine.items()
        }

        def write() -> None:
            size, others = zip(*self._gathered((self._snapshot.bytes, changed)), strict=True)
            if writer is not None:
                writer.bytes = sum(size)
            self._write(path, pieces, contents, {} if any(others) else standing)

        if writer is None:
            write()
        else:
            writer.start(write, self._snapshot.bytes)

    def _write(
        self,
        path: Path,
        pieces: Mapping[str, Mapping[str, Piece]],
        contents: Contents,
        standing: Mapping[str, dict[str, Any]],
    ) -> None:
        """In the thread, on all processes: nothing here may use another group."""
        self._written, temporary = None, None
        try:
            temporary = self._first(lambda: begin(path))
            files = self._first(lambda: link(path, temporary, standing)) or self._parts(temporary, pieces)
            self._first(lambda: commit(temporary, path, files, contents.plain, contents.manifest))
        except BaseException:
            if temporary is not None and dist.get_rank() == 0:
                discard(temporary)
            raise
        self._written = path, files

    def _parts(self, temporary: Path, pieces: Mapping[str, Mapping[str, Piece]]) -> dict[str, dict[str, Any]]:
        """Sizes and digests of the files that all processes write."""
        rank, world = dist.get_rank(), dist.get_world_size()
        empty = {part_name(file, 0, world): {} for file, found in pieces.items() if not found}
        mine = dict(self._first(lambda: write_tensors(temporary, empty)))  # which PyTorch leaves out
        for file, found in pieces.items():
            target = PartWriter(temporary, part_name(file, rank, world))
            with _plain_errors():
                dcp.save(found, storage_writer=target, planner=PiecePlanner(), process_group=self.group)
            mine |= target.fs.entries
        return {name: entry for part in self._gathered(mine) for name, entry in part.items()}

    def load_model(self, model: nn.Module, stored: Stored, name: str) -> None:
        """Weights and buffers of a model whose weights are shares, from the files of this name."""
        values = model.state_dict()
        values = {name: value if isinstance(value, DTensor) else value.clone() for name, value in values.items()}
        self.load(values, stored, name)
        model.load_state_dict(values)

    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any], prefix: str, stored: Stored) -> None:
        """The state of an optimizer, of whose tensors only the shares of this process are read.

        Args:
            optimizer: of the shared weights.
            state: its stored state, with tensors on the meta device for those that are read here.
            prefix: of their names in the files.
            stored: the checkpoint.
        """
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        places = dict(zip(numbers, weights, strict=True))
        found = {
            number: {key: room_for(value, places[number]) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        wanted = {
            f"{prefix}.state.{number}.{key}": found[number][key]
            for number, values in state["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor) and value.is_meta
        }
        self.load(wanted, stored, TENSORS)
        optimizer.load_state_dict({**state, "state": found})

    def load(self, values: dict[str, Tensor], stored: Stored, name: str) -> None:
        """Fills tensors, distributed ones with their shares alone.

        Raises:
            CorruptCheckpoint: a name is missing there, has another shape, or a file cannot be read.
        """
        reader = PartReader(stored.folder, parts_of(stored.files, name))
        try:
            dcp.load(values, storage_reader=reader, process_group=self.group)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise CorruptCheckpoint(
                f"checkpoint: the shares in {stored.folder} cannot be read, got {type(reason).__name__}: {reason}; "
                "use another checkpoint"
            ) from error

    def _first(self, call: Callable[[], Any]) -> Any:
        """What process 0 makes of it, on all; an error of it is raised on all."""
        found = [_attempt(call) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _gathered(self, value: Any) -> list[Any]:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self.group)
        return found


def outlines(folder: Path, files: Iterable[str], name: str) -> dict[str, Tensor]:
    """As `read_parts`, but what is of the model, its average or an optimizer is on the meta device."""
    head = read_heads(folder, name)
    drawn = {
        key: torch.empty(shape, dtype=TYPES.get(head.kinds[key]), device="meta")
        for key, shape in head.shapes.items()
        if name != TENSORS or (shape and _OF_WEIGHTS.match(key))
    }
    return drawn | read_parts(folder, files, name, lambda key: key not in drawn)


def check_outlines(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Compares names and shapes of a module's tensors.

    Raises:
        RuntimeError: the first that differs.
    """
    for name in [*stored, *own]:
        there, here = (tuple(at[name].shape) if name in at else "nothing" for at in (stored, own))
        if there != here:
            raise RuntimeError(f"{name} is {there} there and {here} here")


def room_for(value: Any, weight: Tensor) -> Any:
    """Where an outline of an optimizer's state is read to: a share where the weight is one; else the value itself."""
    if not (isinstance(value, Tensor) and value.is_meta):
        return value
    if isinstance(weight, DTensor) and value.shape == weight.shape:
        return torch.empty_like(weight, dtype=value.dtype, requires_grad=False)
    return torch.empty(value.shape, dtype=value.dtype)


def _mine(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The shares; what is whole is written by process 0, as it has it."""
    return ((name, value) for name, value in tensors.items() if isinstance(value, DTensor) or dist.get_rank() == 0)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong on some process, in place of PyTorch's bundle of all."""
    try:
        yield
    except CheckpointException as error:
        found = [failure[0] for failure in error.failures.values()]
        reason = next((one for one in found if isinstance(one, OSError)), found[0])
        raise reason from error


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return OSError(error.errno, error.strerror or str(error))
    except Exception as error:  # nobody waits for what does not come
        return error
