"""What a command that is refused leaves in outputs/: nothing. Only what the command itself has made is removed.

Hydra makes the folder of a run before the run is looked at. A run that begins writes train.log (`models.runs.record`);
a folder without it, that was not there when the command began, goes again when the command ends.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

BEGUN = ("train.log", "metrics.json", "slurm")


class _Noted(NamedTuple):
    """A folder before the command; `inside` is None where there was none. Of a sweep, the folders of its new runs."""

    folder: Path
    inside: frozenset[str] | None
    missing: list[Path]
    sweep: bool
    known: frozenset[Path]  # folders that were there
    made: list[Path]


_noted: list[_Noted] = []


class Leftovers(Callback):
    """Notes what is there before Hydra makes the folder of a run or of a sweep."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with contextlib.suppress(OmegaConfBaseException):  # of a name that cannot be: refused by what comes next
            _note(Path(config.hydra.run.dir).absolute(), sweep=False)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _note(Path(config.hydra.sweep.dir).absolute(), sweep=True)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        job = Path(config.hydra.runtime.output_dir)
        if _noted and _noted[-1].sweep and job not in _noted[-1].known:
            _noted[-1].made.append(job)


def remove() -> None:
    """Removes the folders of runs that never began; called when the command ends, whatever ended it."""
    while _noted:
        folder, inside, missing, sweep, _, made = _noted.pop()
        if not folder.is_dir():
            continue
        for job in made:
            if job.is_dir() and not _begun(job):
                shutil.rmtree(job, ignore_errors=True)
                _remove_empty(job.parent, folder)
        if inside is None and not _begun(folder) and not (sweep and _holds_runs(folder)):
            shutil.rmtree(folder, ignore_errors=True)
        elif "checkpoints" not in (inside or ()) and not _locked(folder / ".lock"):  # or it is another command's
            with contextlib.suppress(OSError):  # it holds some
                (folder / "checkpoints").rmdir()
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def first_process() -> bool:
    """Whether this is the only process of a run, or the first of several: known before these meet."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _note(folder: Path, sweep: bool) -> None:
    if not first_process():  # it has the folder
        return
    inside = frozenset(os.listdir(folder)) if folder.is_dir() else None
    known = frozenset(_folders(folder)) if sweep else frozenset()
    _noted.append(_Noted(folder, inside, [path for path in folder.parents if not path.exists()], sweep, known, []))


def _folders(folder: Path) -> Iterator[Path]:
    """All folders at any depth, but what is in those of runs: Hydra has put its own into each."""
    for path, inside, _ in os.walk(folder):
        if ".hydra" in inside:
            inside.clear()
        yield Path(path)


def _remove_empty(folder: Path, top: Path) -> None:
    """The levels of a sweep's folder in which no run is left."""
    while folder != top and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _begun(folder: Path) -> bool:
    """Whether a run has begun there, or another command is about to: it holds the lock."""
    kept = any((folder / name).exists() for name in BEGUN) or any(folder.glob("checkpoints/step-*"))
    return kept or _locked(folder / ".lock")


def _locked(path: Path) -> bool:
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        pass
    return False


def _holds_runs(folder: Path) -> bool:
    """Whether anything besides Hydra's own file is left in the folder of a sweep."""
    return any(entry.name != "multirun.yaml" for entry in folder.iterdir())
