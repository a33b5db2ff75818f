"""Reads weights by name out of a checkpoint directory, a safetensors file, or a file of a paper's authors."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from conf.files import opened
from models.checkpoints.format.directory import EMA, MODEL, read_manifest, resolve, verify
from models.checkpoints.format.door import CorruptCheckpoint, read_tensors
from models.checkpoints.format.parts import parts_of, read_parts
from models.checkpoints.hub import fetch
from models.checkpoints.stand_ins import Settings, stand_ins

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    from torch import Tensor

# How files nest their weights, the usual names first; any other mapping that holds most tensors is one as well.
_RAW_NESTS = ("model", "state_dict", "model_state_dict", "net", "weights", "params", "state_dict_ema", "model_ema")
_EMA_NESTS = ("model_ema", "state_dict_ema", "ema")
AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|teacher|momentum)([._]|$)")
_NO_NEST = re.compile("optim|scaler")  # their tensors have the names of weights, too
_MAX_NESTS = 8  # a hostile file can hold itself
# What wrappers put before all names: DataParallel and DDP, Lightning modules, and those of tutorials;
_PREFIXES = ("module.", "model.", "net.", "network.")
# and what compiled, sharded and recomputed blocks put before theirs.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = re.compile(r"(^|.*\.)(total_ops|total_params|n_averaged)")  # of thop's profiler, and of torch's averages


def load_weights(path: str | os.PathLike, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a checkpoint, by the names that the file gives them, on the CPU.

    Args:
        path: a checkpoint directory (`step-…`, `best`, `last`), the folder of a run (its best, else its last), a
            name of the hub (`timm/…`, `hf-hub:…`) or a folder downloaded from there, a safetensors file, or a file of
            torch with any suffix, as authors, Lightning and tutorials write them. The latter is read by torch's
            weights-only loader, with stand-ins for the settings that many keep beside the weights (`stand_ins.py`);
            nests (`model`, `state_dict`, …), prefixes (`module.`, `model.`, `_orig_mod.`) and counters of profilers
            are taken off.
        ema: the averaged weights instead of the raw ones.

    Raises:
        ValueError: nothing is there, it is damaged, it holds no (averaged) weights, or loading it would run code.
    """
    path = fetch(path)
    if path.is_dir() or not path.exists() or path.name in ("best", "last"):
        return _from_directory(resolve(path), ema)
    if path.suffix == ".safetensors" or _begins_as_safetensors(path):
        return _from_safetensors(path, ema)
    return _from_torch(path, ema)


def _from_directory(path: Path, ema: bool) -> dict[str, Tensor]:
    files = read_manifest(path)["files"]
    if ema and not parts_of(files, EMA):
        raise UserError(f"load_weights: this checkpoint has no averaged weights, got {path}; use ema=False")
    name = EMA if ema else MODEL
    verify(path, parts_of(files, name) or [name])
    return read_parts(path, files, name)


def _from_safetensors(path: Path, ema: bool) -> dict[str, Tensor]:
    if ema and path.name != EMA:
        raise UserError(f"load_weights: a single file has no averaged weights beside it, got {path}; use ema=False")
    try:
        return read_tensors(path.resolve())  # a link that the user names may lead anywhere
    except CorruptCheckpoint as error:
        raise UserError(f"load_weights: not a valid safetensors file, got {path}: {error}; fetch it again") from error


def _begins_as_safetensors(path: Path) -> bool:
    """Whether a file of another suffix has the head of a safetensors file: eight bytes of length, then JSON."""
    with opened(path) as file:
        return file.read(10)[8:] == b'{"'


def _from_torch(path: Path, ema: bool) -> dict[str, Tensor]:
    import torch

    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise UserError(
            f"load_weights: a pickle is read as weights only, got {path} with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD set; "
            "unset that variable"
        )
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
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise UserError(f"the member {member.filename} is compressed, which torch never does")


def unwrap(content: Any, ema: bool, where: str, who: str = "load_weights") -> dict[str, Any]:
    """The innermost mapping of weights in an authors' file."""
    wanted = ema
    for _ in range(_MAX_NESTS):
        key = _nest(content, wanted) if isinstance(content, dict) else None
        if key is None:
            break
        content, wanted = content[key], False
    if wanted:
        raise UserError(f"{who}: this file has no averaged weights, got {where}; use ema=False")
    if isinstance(content, Settings):
        raise UserError(f"{who}: this file holds a model itself, got {where}; save its state_dict() instead")
    if not isinstance(content, dict):
        raise UserError(f"{who}: a mapping of weights was expected, got {type(content).__name__} in {where}")
    return content


def _nest(content: dict[Any, Any], ema: bool) -> str | None:
    """The key below which the (averaged) weights are; None where they are not deeper."""
    nests = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, dict)}
    if known := next((key for key in (_EMA_NESTS if ema else _RAW_NESTS) if key in nests), None):
        return known
    if _tensors(content) and not ema:
        return None
    sizes = {key: _most(value) for key, value in nests.items() if not _NO_NEST.search(key)}
    averages = [key for key in sizes if sizes[key] and AVERAGE.search(key)]
    others = [key for key in sizes if sizes[key] and key not in averages]
    found = averages if ema else others or averages
    return max(found, key=sizes.get, default=None)


def _most(content: dict[Any, Any], depth: int = 0) -> int:
    """How many tensors are together in a mapping, or in one inside of it."""
    if depth > _MAX_NESTS:
        return 0
    inner = (value for key, value in content.items() if isinstance(key, str) and isinstance(value, dict))
    return max(_tensors(content), *(_most(value, depth + 1) for value in inner), 0)


def _tensors(content: dict[Any, Any]) -> int:
    from torch import Tensor

    return sum(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def strip(content: dict[str, Any], where: str, who: str = "load_weights") -> dict[str, Tensor]:
    """The tensors of a mapping, without the prefixes that wrappers put before the names."""
    from torch import Tensor

    weights = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{who}: no weights were found, got {where} with the keys: {keys}")
    weights = {_WRAPPERS.sub("", name): value for name, value in weights.items() if not _COUNTERS.fullmatch(name)}
    while prefix := next((p for p in _PREFIXES if weights and all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
