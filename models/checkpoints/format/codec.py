"""Turns the nested state of a run into JSON and named tensors, and back: a closed set of types, and no pickle.

Types: tensors, None, bool, int, float (also NaN and infinities), str, list, tuple, and dict with any of these as keys.
A type outside the set is refused while saving, where its owner can still be named, and not weeks later while loading.

In JSON a mapping with plain string keys is an object; everything JSON has no word for is an object with one key that
begins with `$`: `{"$tensor": name}`, `{"$float": "nan"}`, `{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError

_CHANNELS_LAST = "$channels_last"


def encode(
    value: Any, tensors: dict[str, Tensor], path: str = "", keep: Callable[[Tensor, str], Tensor] | None = None
) -> Any:
    """The JSON form of a value; its tensors are added to `tensors` under their path.

    Args:
        value: what is stored.
        tensors: gets the tensors in it.
        path: of the value in what it is a part of.
        keep: makes what is added of a tensor and its path; default `plain_tensor`, a copy.

    Raises:
        TypeError: something inside has a type that is not in the set; the message names its path and type.
    """
    if isinstance(value, Tensor):
        return _encode_tensor(value, tensors, path, keep or plain_tensor)
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if type(value) in (list, tuple):
        items = [encode(item, tensors, _join(path, index), keep) for index, item in enumerate(value)]
        return {"$tuple": items} if type(value) is tuple else items
    if type(value) in (dict, OrderedDict):
        items = [(key, encode(item, tensors, _join(path, key), keep)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$dict": [[encode(key, tensors, f"{path} (key)", keep), item] for key, item in items]}
    raise TypeError(
        f"checkpoint: the entry {path!r} must be a tensor or plain data, got "
        f"{type(value).__module__}.{type(value).__qualname__}; convert it where it is put into the state"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value whose JSON form and tensors `encode` made.

    Raises:
        ValueError: a tag is unknown or a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item, tensors) for key, item in value.items()}
    ((tag, content),) = value.items()
    if tag == "$float":
        return float(content)
    if tag == "$tuple":
        return tuple(decode(item, tensors) for item in content)
    if tag == "$dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in content}
    if tag in ("$tensor", _CHANNELS_LAST) and content in tensors:
        tensor = tensors[content]
        return tensor.contiguous(memory_format=torch.channels_last) if tag == _CHANNELS_LAST else tensor
    raise UserError(f"checkpoint: unknown entry in the stored state, got {{{tag!r}: {content!r}}}")


def plain_tensor(tensor: Tensor, path: str) -> Tensor:
    """A copy on the CPU that shares its storage with nothing, in the usual layout.

    Raises:
        TypeError: see `dense_tensor`.
    """
    dense = dense_tensor(tensor, path)
    return torch.empty_like(dense, device="cpu", memory_format=torch.contiguous_format).copy_(dense)


def dense_tensor(tensor: Tensor, path: str) -> Tensor:
    """The tensor itself, of which a file can be made.

    Raises:
        TypeError: it is sparse or quantized, or has no storage.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(
            f"checkpoint: the entry {path!r} must be a dense tensor with data, got {tensor.layout} on {tensor.device}"
        )
    return tensor.detach()


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _encode_tensor(
    tensor: Tensor, tensors: dict[str, Tensor], path: str, keep: Callable[[Tensor, str], Tensor]
) -> dict[str, str]:
    name = path or "value"
    while name in tensors:  # the keys 1 and "1" of one mapping have the same path
        name += "'"
    tensors[name] = keep(tensor, path)
    # Fused optimizers need their state in the layout of the parameter, which safetensors does not keep.
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    channels_last = channels_last and tensor.is_contiguous(memory_format=torch.channels_last)
    return {_CHANNELS_LAST if channels_last else "$tensor": name}
