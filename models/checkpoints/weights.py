"""Reads weights by name out of a checkpoint directory, a safetensors file, or a file of a paper's authors."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoints.directory import EMA, MODEL, nearby, read_manifest, resolve, verify
from models.checkpoints.stand_ins import stand_ins

# How the published files nest their weights; the averaged ones come first where they are asked for.
_RAW_NESTS = ("model", "state_dict", "state_dict_ema", "model_ema")
_EMA_NESTS = ("model_ema", "state_dict_ema", "ema")
_PREFIXES = ("module.", "_orig_mod.")


def load_weights(path: str | os.PathLike, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a checkpoint, by the names that the file gives them, on the CPU.

    Args:
        path: a checkpoint directory (`step-…`, `best`, `last`), a `.safetensors` file, or a `.pth`, `.pt`, `.bin`,
            `.ckpt` or `.tar` file as authors publish them. The latter is read by torch's weights-only loader, with
            stand-ins for the settings that many keep beside the weights (`stand_ins.py`), and its usual nests (`model`,
            `state_dict`, …) and prefixes (`module.`, `_orig_mod.`) are taken off.
        ema: the averaged weights instead of the raw ones.

    Raises:
        ValueError: nothing is there, it is damaged, it holds no (averaged) weights, or loading it would run code.
    """
    path = Path(path)
    if path.is_dir() or not path.exists() or path.name in ("best", "last"):
        return _from_directory(resolve(path), ema)
    if path.suffix == ".safetensors":
        return _from_safetensors(path, ema)
    return _from_torch(path, ema)


def _from_directory(path: Path, ema: bool) -> dict[str, Tensor]:
    if ema and EMA not in read_manifest(path)["files"]:
        raise ValueError(f"load_weights: this checkpoint has no averaged weights, got {path}; use ema=False")
    name = EMA if ema else MODEL
    verify(path, [name])
    return load_file(path / name)


def _from_safetensors(path: Path, ema: bool) -> dict[str, Tensor]:
    if ema and path.name != EMA:
        raise ValueError(f"load_weights: a single file has no averaged weights beside it, got {path}; use ema=False")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load_weights: not a valid safetensors file, got {path}: {error}; fetch it again") from error


def _from_torch(path: Path, ema: bool) -> dict[str, Tensor]:
    try:
        _refuse_compressed(path)
        with torch.serialization.safe_globals(list(stand_ins(path))):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")[:300]
        raise ValueError(
            f"load_weights: this file holds more than weights and loading it could run code, got {path}: {reason}; "
            "export its state_dict to .safetensors in an environment that you trust"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"load_weights: this file cannot be read, got {path}: {error}; {nearby(path)}") from error
    return strip(unwrap(content, ema, str(path)), str(path))


def _refuse_compressed(path: Path) -> None:
    """torch stores tensors uncompressed; a compressed member can be a small file that fills the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"the member {member.filename} is compressed, which torch never does")


def unwrap(content: Any, ema: bool, where: str) -> dict[str, Any]:
    """The innermost mapping of weights in an authors' file."""
    nests = _EMA_NESTS if ema else _RAW_NESTS
    found = ""
    while isinstance(content, dict) and (key := next((k for k in nests if isinstance(content.get(k), dict)), None)):
        content, found = content[key], key
        nests = _RAW_NESTS
    if ema and not found:
        raise ValueError(f"load_weights: this file has no averaged weights, got {where}; use ema=False")
    if not isinstance(content, dict):
        raise ValueError(f"load_weights: a mapping of weights was expected, got {type(content).__name__} in {where}")
    return content


def strip(content: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors of a mapping, without the prefixes that wrappers put before the names."""
    weights = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        keys = ", ".join(map(str, list(content)[:8]))
        raise ValueError(f"load_weights: no weights were found, got {where} with the keys: {keys}")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
