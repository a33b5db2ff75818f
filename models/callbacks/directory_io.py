"""Lightning's plugin that writes checkpoints as directories, in place of its `TorchCheckpointIO`.

The format is described in `models/checkpoints/format/directory.py`.
"""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from conf.errors import UserError
from conf.revision import revision
from models.checkpoints.format.codec import decode, encode, plain_tensor
from models.checkpoints.format.directory import (
    ADAPTER,
    CONFIG,
    EMA,
    MODEL,
    TENSORS,
    TRAINER,
    read_json,
    resolve,
    verify,
)
from models.checkpoints.format.door import read_tensors
from models.checkpoints.format.write import remove_checkpoint, write_checkpoint

# Entries that callbacks add to Lightning's checkpoint and that get a file of their own.
EMA_KEY, ADAPTER_KEY, CONFIG_KEY, METRICS_KEY = "ema", "adapter", "run_config", "metrics"
_PREFIX = "model."
_LIBRARIES = ("torch", "pytorch-lightning", "timm", "safetensors", "numpy")


class DirectoryCheckpointIO(CheckpointIO):
    """Saves and loads Lightning's checkpoint mapping as a directory of safetensors and JSON."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the directory `path`; the mapping itself is left as it is.

        Raises:
            TypeError: an entry has a type that the format does not know; the message names its path.
            ValueError: the LightningModule keeps no weights under `model.`.
            OSError: the storage failed; nothing half-written remains.
        """
        state = dict(checkpoint)
        weights = state.pop("state_dict")
        averaged = state.pop(EMA_KEY, None)
        adapter = state.pop(ADAPTER_KEY, None)
        config, metrics = state.pop(CONFIG_KEY, {}), state.pop(METRICS_KEY, {})
        model = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
        state["state_dict"] = {name: value for name, value in weights.items() if not name.startswith(_PREFIX)}
        if not model:
            raise UserError(
                f"DirectoryCheckpointIO: the network must be self.model of the LightningModule, got {list(weights)[:4]}"
            )
        tensors = {MODEL: {name: plain_tensor(value, name) for name, value in model.items()}}
        if averaged is not None:
            tensors[EMA] = {name: plain_tensor(value, name) for name, value in averaged.items()}
        if adapter is not None:
            tensors[ADAPTER] = {name: plain_tensor(value, name) for name, value in adapter.items()}
        trainer_tensors: dict[str, Tensor] = {}
        plain = {TRAINER: encode(state, trainer_tensors), CONFIG: config}
        manifest = {
            "step": checkpoint["global_step"],
            "epoch": checkpoint["epoch"],
            "metrics": encode(metrics, {}),
            "commit": str(revision()),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        }
        write_checkpoint(Path(path), {**tensors, TENSORS: trainer_tensors}, plain, manifest)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads what `save_checkpoint` wrote, after verifying every checksum. Tensors arrive on the CPU.

        Raises:
            ValueError: the path is no checkpoint, or one of its files is damaged; the message names it.
        """
        path = resolve(path)
        files = verify(path)["files"]
        state = decode(read_json(path / TRAINER), read_tensors(path / TENSORS))
        model = read_tensors(path / MODEL)
        state["state_dict"] = {f"{_PREFIX}{name}": value for name, value in model.items()} | state["state_dict"]
        if EMA in files:
            state[EMA_KEY] = read_tensors(path / EMA)
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint directory."""
        remove_checkpoint(Path(path))
