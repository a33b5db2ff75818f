"""PyTorch's distributed checkpoint on files of ours: safetensors with our names, hashed as they are written.

Source: `torch.distributed.checkpoint`, whose files of HuggingFace's kind these are.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from models.checkpoints.format.disk import NewFile
from models.checkpoints.format.parts import heads_of
from models.checkpoints.format.tensors import encoded


class Piece(NamedTuple):
    """What this process writes of a tensor: a copy, where in the whole it is, and the size of that."""

    copy: Tensor
    place: ChunkStorageMetadata
    whole: torch.Size

    @classmethod
    def of(cls, value: Tensor, copy: Tensor) -> "Piece":
        """Of a tensor, or of this process's share of a distributed one."""
        if isinstance(value, DTensor):
            (place,) = value.__create_chunk_list__()
        else:
            place = ChunkStorageMetadata(torch.Size([0] * value.dim()), value.shape)
        return cls(copy, place, value.shape)

    def item(self, name: str) -> WriteItem:
        """As a writer is told of it."""
        data = TensorWriteData(self.place, TensorProperties.create_from_tensor(self.copy), self.whole)
        return WriteItem(MetadataIndex(name, self.place.offsets), WriteItemType.SHARD, tensor_data=data)


class PiecePlanner(DefaultSavePlanner):
    """Writes pieces as what they are parts of."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([piece.item(name) for name, piece in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].copy


class Hashed(FileSystem):
    """Gives what a process writes its name, and knows the digest when it is written."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.entries: dict[str, dict[str, Any]] = {}

    def concat_path(self, path: str | Path, suffix: str) -> Path:
        return Path(path) / (self._name if suffix.startswith("shard-") else suffix)

    @contextmanager
    def create_stream(self, path: str | Path, mode: str) -> Iterator[io.RawIOBase]:
        with NewFile(Path(path)) as file:
            yield _Stream(file)
        self.entries[Path(path).name] = file.entry


class PartWriter(HuggingFaceStorageWriter):
    """Writes one file of a directory of ours."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.fs = Hashed(name)
        self.sync_files = False  # a new file of ours is flushed when it is closed
        self.per_thread_copy_ahead = 0  # pieces are on the host: no stream of a GPU is asked for


class _At(NamedTuple):
    relative_path: str


class PartReader(HuggingFaceStorageReader):
    """Reads files of a directory of ours, of one process or of several, also those of before they said offsets."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        super().__init__(str(folder))
        self._folder, self._files = folder, files

    def read_metadata(self) -> Metadata:
        """Parts follow each other along the first dimension, in the order of the files."""
        found: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, _At] = {}
        for file, head in zip(self._files, heads_of(self._folder, self._files), strict=True):
            for name, shape in head.shapes.items():
                before = found.get(name, TensorStorageMetadata(TensorProperties(), torch.Size([0, *shape[1:]]), []))
                offsets = torch.Size([before.size[0], *[0] * (len(shape) - 1)] if shape else [])
                size = torch.Size([before.size[0] + shape[0], *shape[1:]] if shape else [])
                chunks = [*before.chunks, ChunkStorageMetadata(offsets, torch.Size(shape))]
                found[name] = TensorStorageMetadata(TensorProperties(), size, chunks)
                places[MetadataIndex(name, offsets)] = _At(str(self._folder / file))
        return Metadata(found, storage_data=places)


class _Stream(io.RawIOBase):
    """A new file as what the writer writes to, all of it at once; closing is left to who opened it."""

    def __init__(self, file: NewFile) -> None:
        self._file, self._at = file, 0

    def write(self, content: Any) -> int:
        """The text beside the tensors comes in any order: it is sorted, so that equal tensors make equal files."""
        view = memoryview(content)
        end = 8 + int.from_bytes(view[:8], "little")
        head = json.loads(bytes(view[8:end]))
        self._file.write(encoded(head | {"__metadata__": dict(sorted(head["__metadata__"].items()))}))
        self._file.write(view[end:])
        self._at += len(view)
        return len(view)

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        pass
