"""Lightning's plugin that writes checkpoints as directories, in place of its `TorchCheckpointIO`.

The format is described in `models/checkpoints/format/directory.py`.
"""

import platform
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from conf.errors import UserError
from conf.revision import revision
from models.callbacks.snapshot import Snapshot
from models.callbacks.writer import Writer
from models.checkpoints.format.codec import decode, dense_tensor, encode
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
from models.checkpoints.format.door import CorruptCheckpoint
from models.checkpoints.format.parts import parts_of, read_parts
from models.checkpoints.format.write import remove_checkpoint, write_checkpoint

# Entries that callbacks add to Lightning's checkpoint and that get a file of their own.
EMA_KEY, ADAPTER_KEY, CONFIG_KEY, METRICS_KEY = "ema", "adapter", "run_config", "metrics"
_PREFIX = "model."
# what Lightning restores by these names, and what they are
_ENTRIES = {
    **{"epoch": int, "global_step": int, "state_dict": dict, "loops": dict, "callbacks": dict},
    **{"optimizer_states": list, "lr_schedulers": list},
}
_LIBRARIES = ("torch", "pytorch-lightning", "timm", "safetensors", "numpy")


class Contents(NamedTuple):
    """What a checkpoint directory is made of: see `write_checkpoint`."""

    tensors: dict[str, dict[str, Tensor]]
    plain: dict[str, Any]
    manifest: dict[str, Any]


class DirectoryCheckpointIO(CheckpointIO):
    """Saves and loads Lightning's checkpoint mapping as a directory of safetensors and JSON."""

    def __init__(self) -> None:
        self._snapshot = Snapshot()
        self._written: tuple[Path, dict[str, dict[str, Any]]] | None = None  # what stands on the disk of the snapshot

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Writer | None = None
    ) -> None:
        """Writes the directory `path`; the mapping itself is left as it is.

        Args:
            checkpoint: Lightning's mapping.
            path: of the directory; one that stands there is replaced.
            storage_options: what writes beside training, of what the tensors are when this returns, and reports an
                OSError later; without it everything is on the disk when this returns.

        Raises:
            TypeError: an entry has a type that the format does not know; the message names its path.
            ValueError: the LightningModule keeps no weights under `model.`.
            OSError: the storage failed; nothing half-written remains.
        """
        path, contents = Path(path), contents_of(checkpoint)
        standing = self._written[1] if self._written is not None and self._written[0] == path else None
        if self._snapshot.take(contents.tensors, compare=standing is not None):
            standing = None

        def write() -> None:
            self._written = None
            copies = self._snapshot.content
            self._written = path, write_checkpoint(path, copies, contents.plain, contents.manifest, standing)

        if storage_options is None:
            write()
        else:
            storage_options.start(write, self._snapshot.bytes)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads what `save_checkpoint` wrote, after verifying every checksum. Tensors arrive on the CPU.

        Raises:
            ValueError: the path is no checkpoint, or one of its files is damaged; the message names it.
        """
        return state_of(resolve(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint directory."""
        remove_checkpoint(Path(path))


def contents_of(checkpoint: dict[str, Any]) -> Contents:
    """Lightning's mapping in files; the tensors are those of the mapping and no copies.

    Raises:
        TypeError: an entry has a type that the format does not know; the message names its path.
        ValueError: the LightningModule keeps no weights under `model.`.
    """
    state = dict(checkpoint)
    weights = state.pop("state_dict")
    config, metrics = state.pop(CONFIG_KEY, {}), state.pop(METRICS_KEY, {})
    model = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
    if not model:
        raise UserError(
            f"DirectoryCheckpointIO: the network must be self.model of the LightningModule, got {list(weights)[:4]}"
        )
    files = {MODEL: model, EMA: state.pop(EMA_KEY, None), ADAPTER: state.pop(ADAPTER_KEY, None)}
    tensors = {
        file: {name: dense_tensor(value, name) for name, value in content.items()}
        for file, content in files.items()
        if content is not None
    }
    tensors[TENSORS] = {}
    state["state_dict"] = {name: value for name, value in weights.items() if not name.startswith(_PREFIX)}
    plain = {TRAINER: encode(state, tensors[TENSORS], keep=dense_tensor), CONFIG: config}
    manifest = {
        "step": checkpoint["global_step"],
        "epoch": checkpoint["epoch"],
        "metrics": encode(metrics, {}),
        "commit": str(revision()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    }
    return Contents(tensors, plain, manifest)


def state_of(path: Path, read: Callable[..., dict[str, Tensor]] = read_parts) -> dict[str, Any]:
    """Lightning's mapping, of a checkpoint directory whose checksums are verified first.

    Args:
        path: of the directory.
        read: how tensors are read, as `read_parts` does it.

    Raises:
        CorruptCheckpoint: a file is damaged, or holds another thing than what a run writes.
    """
    files = verify(path)["files"]
    state = _state_in(path, files, read)
    model = read(path, files, MODEL)
    state["state_dict"] = {f"{_PREFIX}{name}": value for name, value in model.items()} | state["state_dict"]
    if parts_of(files, EMA):
        state[EMA_KEY] = read(path, files, EMA)
    return state


def _state_in(path: Path, files: Iterable[str], read: Callable[..., dict[str, Tensor]]) -> dict[str, Any]:
    """What a checkpoint holds besides weights.

    Raises:
        CorruptCheckpoint: it is another thing than what a run writes.
    """
    content, tensors = read_json(path / TRAINER), read(path, files, TENSORS)
    try:
        state = decode(content, tensors)
        wrong = [name for name, kind in _ENTRIES.items() if not isinstance(state[name], kind)]
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"checkpoint: {path / TRAINER} is no state of a run, got {type(error).__name__}: {error}; "
            "use another checkpoint"
        ) from error
    if wrong:
        raise CorruptCheckpoint(
            f"checkpoint: {path / TRAINER} is no state of a run, got {wrong[0]} of {type(state[wrong[0]]).__name__}; "
            "use another checkpoint"
        )
    return state


@contextmanager
def restoring(path: Path | None) -> Iterator[None]:
    """What goes wrong while Lightning restores a checkpoint is said of the checkpoint: it holds another run's state.

    Raises:
        CorruptCheckpoint: in place of whatever was raised there.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        within = any(place.name.startswith(_RESTORING) and "checkpoint_connector" in place.filename for place in places)
        if path is None or not within or "out of memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CorruptCheckpoint(
            f"checkpoint: the state in {path} cannot be restored, got {type(error).__name__}: {reason}; "
            "use another checkpoint"
        ) from error


_RESTORING = ("restore", "_restore", "resume_start")
