"""Writes a safetensors file in one pass that hashes it too.

Source: the format of huggingface/safetensors: eight bytes of length, a JSON header padded to eight bytes, the data.
Tensors stand in the order in which its own writer puts them, so that both write the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.format.disk import NewFile

# The names of the format; its writer puts the last ones first, so that every tensor is aligned.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
TYPES = {name: kind for kind, name in _NAMES.items()}
_RANK = {kind: rank for rank, kind in enumerate(_NAMES)}


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A new safetensors file, flushed to the disk, with the permissions that every other new file gets.

    Args:
        tensors: by name; dense, on any device.
        path: of the file, which must not exist.
        metadata: text that the file keeps beside the tensors.

    Returns:
        Size and SHA-256, as a manifest stores them.

    Raises:
        TypeError: a tensor has a type that the format has no name for.
        OSError: it could not be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"checkpoint: the entry {name!r} must have a type of safetensors, got {tensor.dtype}")
    names = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
    with NewFile(path) as file:
        file.write(_head({name: tensors[name] for name in names}, metadata))
        for name in names:
            file.write(_bytes(tensors[name]))
    return file.entry


def _head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = _NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return encoded(header)


def encoded(header: Mapping[str, Any]) -> bytes:
    """What a safetensors file begins with."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
