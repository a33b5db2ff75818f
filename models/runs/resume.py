"""Going on: the checkpoint to resume from."""

import logging
import os
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.leftovers import BEGUN
from conf.names import nearest, short
from models.checkpoints.format.directory import (
    POINTERS,
    TRAINER,
    latest,
    nearby,
    read_config,
    read_json,
    read_manifest,
    resolve,
    verify,
)
from models.checkpoints.format.write import recover

log = logging.getLogger(__name__)

# how often whoever started this process has done so before
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def find_resume(resume: str | None, run_dir: str | os.PathLike) -> Path | None:
    """The checkpoint directory to resume from, verified.

    A command that says where to begin (None, or a path) goes on with its own run where it is given once more: by a
    scheduler that starts its job again, or with a path that its run has left behind.

    Args:
        resume: None or "" for a new run; "auto" for the newest valid checkpoint of the run folder, if there is one;
            "must" for the same, where there has to be one; otherwise the path of a checkpoint directory or a `best` or
            `last` pointer.
        run_dir: the folder of the run.

    Raises:
        ValueError: the path is no valid checkpoint; the message names those that exist near it. Or there has to be one,
            and there is none; the message names a run with nearly the same name.
    """
    restarted = any(os.environ.get(name, "0") != "0" for name in RESTARTS)
    if not resume:
        return _own(Path(run_dir), None) if restarted else None
    if resume in ("auto", "must"):
        return _newest(Path(run_dir), required=resume == "must")
    path = Path(resume)
    if path.is_file() and path.name not in POINTERS:
        raise UserError(f"resume: a single file holds weights and nothing of the optimizer, got {path}; {nearby(path)}")
    own = _own(Path(run_dir), resume)
    if own is not None and restarted:
        return own
    newest = path / "checkpoints" / "last"  # of the folder of a run
    path = resolve(newest if newest.exists() else path)
    verify(path)
    if own is None or read_manifest(own)["step"] <= read_manifest(path)["step"]:
        return path
    log.info("resume: goes on with what this command has begun, from %s", short(own))
    return own


def _newest(run_dir: Path, required: bool) -> Path | None:
    """The newest checkpoint of the run's folder."""
    directory = run_dir / "checkpoints"
    recover(directory)
    found = latest(directory, log.warning)
    if found is None and required:
        raise UserError(
            f"resume: must goes on with a run, got no checkpoint in {short(directory)}; give the run.name of a run"
            f"{_alike(run_dir)}, or resume=auto to begin this one"
        )
    log.debug("resume: %s", f"continuing {found}" if found else f"no checkpoint in {directory}, starting at 0")
    return found


def _own(run_dir: Path, resume: str | None) -> Path | None:
    """The newest checkpoint of the run's folder, if a command with the same `resume` has written it."""
    found = _newest(run_dir, required=False)
    return found if found is not None and (read_config(found).get("resume") or None) == resume else None


def position_of(checkpoint: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the data module of a configuration has left in a checkpoint: where the run is, and in which data."""
    state = read_json(checkpoint / TRAINER)
    kind = str((config.get("data") or {}).get("_target_")).rpartition(".")[2]
    found = state.get(kind) if isinstance(state, dict) else None
    return found if isinstance(found, dict) else {}


def begins_again(run_dir: Path) -> list[str]:
    """What to say of a run without a checkpoint whose folder is that of an earlier start."""
    if not any((run_dir / name).exists() for name in BEGUN):
        return []
    return [f"no checkpoint in {short(run_dir)}, which an earlier start has made: begins at step 0"]


def _alike(run_dir: Path) -> str:
    """ " (did you mean 'mine'?)" of the runs beside a folder, or "" where no name is like its."""
    try:
        runs = [path.name for path in run_dir.parent.iterdir() if (path / "checkpoints").is_dir() and path != run_dir]
    except OSError:
        return ""
    return f" ({found.removeprefix('; ')})" if (found := nearest(run_dir.name, runs)) else ""
