"""Going on: the checkpoint to resume from, and whether a run and its continuation ask for the same."""

import logging
import os
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from conf.errors import UserError
from models.checkpoints.format.directory import POINTERS, latest, nearby, resolve, verify
from models.checkpoints.format.write import recover

log = logging.getLogger(__name__)

# What must be the same in a continued run, and what in there may change all the same.
SAME = ("model", "image_size", "data", "augment", "optimizer", "schedule", "task", "seed", "trainer")
FREE = (
    *("data.root", "data.source.root", "data.source.path", "data.source.data_dir", "data.source.data_files"),
    *("data.token_labels", "data.source.cache_dir", "data.workers", "data.timeout", "data.on_error"),
    *("task.compile", "task.gradient_checkpointing", "task.autoencoder", "task.sampling", "task.score"),
    *("task.sample_every_n_epochs", "task.seed"),
    *("data.split", "data.source.split", "data.source.val_labels", "data.source.download"),  # the run's own is taken
    "data.batch_size",  # the data module compares the batch of all processes together
    # copies of other settings
    *(
        "model.attention",
        "model.image_size",
        "data.image_size",
        "data.eval.size",
        "data.num_classes",
        "data.seed",
        "data.source.seed",
    ),
    *(f"trainer.{name}" for name in ("_target_", "max_epochs", "max_steps", "max_time", "accelerator", "devices")),
    *(f"trainer.{name}" for name in ("strategy", "num_nodes", "precision", "log_every_n_steps", "limit_val_batches")),
    *(f"trainer.{name}" for name in ("check_val_every_n_epoch", "deterministic", "benchmark")),
    *(
        "trainer.accumulate_grad_batches",
        "data.augment",
        "task.model",
        "task.optimizer",
        "task.schedule",
        "task.num_classes",
    ),
)


def find_resume(resume: str | None, run_dir: str | os.PathLike) -> Path | None:
    """The checkpoint directory to resume from, verified.

    Args:
        resume: None or "" for a new run; "auto" for the newest valid checkpoint of the run folder, if there is one;
            otherwise the path of a checkpoint directory or a `best` or `last` pointer.
        run_dir: the folder of the run.

    Raises:
        ValueError: the path is no valid checkpoint; the message names those that exist near it.
    """
    if not resume:
        return None
    if resume == "auto":
        directory = Path(run_dir) / "checkpoints"
        recover(directory)
        found = latest(directory, log.warning)
        log.debug("resume=auto: %s", f"continuing {found}" if found else f"no checkpoint in {directory}, starting at 0")
        return found
    path = Path(resume)
    if path.is_file() and path.name not in POINTERS:
        raise UserError(f"resume: a single file holds weights and nothing of the optimizer, got {path}; {nearby(path)}")
    newest = path / "checkpoints" / "last"  # of the folder of a run
    path = resolve(newest if newest.exists() else path)
    verify(path)
    return path


def compare_configs(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compares what a continued run must have in common with its checkpoint: model, data, augmentation, optimisation.

    Free to change are the trainer (a longer run, other devices), loggers, callbacks, where data lies and how it is
    read, and what computes the attention (`backend`), which changes it by rounding only.

    Args:
        saved: the configuration in the checkpoint.
        current: the resolved configuration of this command.

    Raises:
        ValueError: one sentence that names every difference, with both values.
    """
    found = differences(saved, current, SAME)
    for key in ("freeze", "freeze_epochs"):
        if saved.get(key) != current.get(key):
            found.append(f"{key} {_describe(saved.get(key), None)} and not {_describe(current.get(key), None)}")
    if found:
        raise UserError(
            f"resume: the checkpoint was trained with {', '.join(found)} as this command asks; "
            "give the same options, or start a new run with another run.name"
        )


def differences(saved: dict[str, Any], current: dict[str, Any], sections: Iterable[str]) -> list[str]:
    """Every setting of the attention and of some sections that two configurations have otherwise: "x and not y"."""
    saved, current = (without_backend(config) for config in (saved, current))
    before, after = saved.get("attention"), current.get("attention")
    found = []
    if before != after and None not in (before, after):
        found.append(f"attention {_describe(before, after)} and not {_describe(after, before)}")
    for section in sections:
        was, now = (dict(_settings(config.get(section), section)) for config in (saved, current))
        for key in {**was, **now} if was and now and section != "attention" else ():
            if was.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE):
                name = key.removesuffix("._target_")
                found.append(f"{name} {_describe(was.get(key), None)} and not {_describe(now.get(key), None)}")
    return found


def without_backend(node: Any) -> Any:
    """A configuration without what computes its attention."""
    if isinstance(node, list):
        return [without_backend(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {key: without_backend(value) for key, value in node.items() if key != "backend"}


def _settings(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every setting below a node, by its full key; lists count as one setting."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _settings(value, f"{path}.{name}")
    elif node is not None:
        yield path, node


def _describe(value: Any, other: Any) -> str:
    """A value in words; of a configured part its name and the options in which it differs from the other."""
    if isinstance(value, list):
        others = other if isinstance(other, list) else []
        return " / ".join(_describe(part, base) for part, base in zip_longest(value, others[: len(value)]))
    if isinstance(value, str):
        return value.rpartition(".")[2]
    if not isinstance(value, dict):
        return str(value)
    name = str(value.get("_target_")).rpartition(".")[2]
    same = isinstance(other, dict) and other.get("_target_") == value.get("_target_")
    changed = {key: item for key, item in value.items() if same and (key not in other or other[key] != item)}
    options = [
        f"{key}={_describe(item, other.get(key)) if isinstance(item, dict) else item}" for key, item in changed.items()
    ]
    return f"{name}({', '.join(options)})" if options else name
