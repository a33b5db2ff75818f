"""Reads weights by name out of a checkpoint directory, a safetensors file, or a file of a paper's authors."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from conf.errors import UserError
from models.checkpoints.format.directory import EMA, MODEL, read_manifest, resolve, verify
from models.checkpoints.stand_ins import stand_ins

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    from torch import Tensor

# How the published files nest their weights; the averaged ones come first where they are asked for.
_RAW_NESTS = ("model", "state_dict", "state_dict_ema", "model_ema")
_EMA_NESTS = ("model_ema", "state_dict_ema", "ema")
_PREFIXES = ("module.", "_orig_mod.")
_MAX_NESTS = 8  # a hostile file can hold itself


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
        raise UserError(f"load_weights: this checkpoint has no averaged weights, got {path}; use ema=False")
    from safetensors.torch import load_file

    name = EMA if ema else MODEL
    verify(path, [name])
    return load_file(path / name)


def _from_safetensors(path: Path, ema: bool) -> dict[str, Tensor]:
    if ema and path.name != EMA:
        raise UserError(f"load_weights: a single file has no averaged weights beside it, got {path}; use ema=False")
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"load_weights: not a valid safetensors file, got {path}: {error}; fetch it again") from error


def _from_torch(path: Path, ema: bool) -> dict[str, Tensor]:
    import torch

    try:
        _refuse_compressed(path)
        with torch.serialization.safe_globals(list(stand_ins(path))):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(str(error), path)) from error
    except Exception as error:  # broken bytes end the loader in many ways: IndexError, struct.error, TypeError …
        reason = re.split(r"\. (?=[A-Z])", " ".join(str(error).split()))[0][:200] or type(error).__name__
        raise UserError(_unreadable(path, reason)) from error
    return strip(unwrap(content, ema, str(path)), str(path))


def _refusal(text: str, path: Path) -> str:
    """One sentence from the page of advice with which torch refuses a pickle."""
    if match := re.search(r"Unsupported operand \d+", text):
        return _unreadable(path, f"it is no pickle of torch ({match[0].lower()})")
    name = re.search(r"GLOBAL (\S+)", text)
    reason = (
        f"it asks for {name[1]}" if name else text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    )
    return (
        f"load_weights: this file holds more than weights and loading it could run code, got {path}: {reason[:200]}; "
        "export its state_dict to .safetensors in an environment that you trust"
    )


def _unreadable(path: Path, reason: str) -> str:
    return f"load_weights: this file cannot be read, got {path}: {reason}; give a file of weights, or fetch it again"


def _refuse_compressed(path: Path) -> None:
    """torch stores tensors uncompressed; a compressed member can be a small file that fills the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"the member {member.filename} is compressed, which torch never does")


def unwrap(content: Any, ema: bool, where: str, who: str = "load_weights") -> dict[str, Any]:
    """The innermost mapping of weights in an authors' file."""
    nests, found = _EMA_NESTS if ema else _RAW_NESTS, ""
    for _ in range(_MAX_NESTS):
        key = next((k for k in nests if isinstance(content, dict) and isinstance(content.get(k), dict)), None)
        if key is None:
            break
        content, found, nests = content[key], key, _RAW_NESTS
    if ema and not found:
        raise UserError(f"{who}: this file has no averaged weights, got {where}; use ema=False")
    if not isinstance(content, dict):
        raise UserError(f"{who}: a mapping of weights was expected, got {type(content).__name__} in {where}")
    return content


def strip(content: dict[str, Any], where: str, who: str = "load_weights") -> dict[str, Tensor]:
    """The tensors of a mapping, without the prefixes that wrappers put before the names."""
    from torch import Tensor

    weights = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{who}: no weights were found, got {where} with the keys: {keys}")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
