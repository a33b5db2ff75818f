"""Going on: the checkpoint to resume from."""

import logging
import os
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.leftovers import BEGUN
from conf.names import nearest, short
from models.checkpoints.format.directory import POINTERS, TRAINER, latest, nearby, read_json, resolve, verify
from models.checkpoints.format.write import recover

log = logging.getLogger(__name__)


def find_resume(resume: str | None, run_dir: str | os.PathLike) -> Path | None:
    """The checkpoint directory to resume from, verified.

    Args:
        resume: None or "" for a new run; "auto" for the newest valid checkpoint of the run folder, if there is one;
            "must" for the same, where there has to be one; otherwise the path of a checkpoint directory or a `best` or
            `last` pointer.
        run_dir: the folder of the run.

    Raises:
        ValueError: the path is no valid checkpoint; the message names those that exist near it. Or there has to be one,
            and there is none; the message names a run with nearly the same name.
    """
    if not resume:
        return None
    if resume in ("auto", "must"):
        directory = Path(run_dir) / "checkpoints"
        recover(directory)
        found = latest(directory, log.warning)
        if found is None and resume == "must":
            raise UserError(
                f"resume: must goes on with a run, got no checkpoint in {short(directory)}; give the run.name of a run"
                f"{_alike(Path(run_dir))}, or resume=auto to begin this one"
            )
        log.debug("resume=auto: %s", f"continuing {found}" if found else f"no checkpoint in {directory}, starting at 0")
        return found
    path = Path(resume)
    if path.is_file() and path.name not in POINTERS:
        raise UserError(f"resume: a single file holds weights and nothing of the optimizer, got {path}; {nearby(path)}")
    newest = path / "checkpoints" / "last"  # of the folder of a run
    path = resolve(newest if newest.exists() else path)
    verify(path)
    return path


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
