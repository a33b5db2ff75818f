"""Reads a checkpoint directory: finds it, verifies its checksums, reads its JSON files. Never unpickles anything.

A checkpoint is `<run>/checkpoints/step-00000800/`:

| file | content |
|---|---|
| `model.safetensors` | raw weights of the model, under the model's own names |
| `ema.safetensors` | averaged weights, if the run kept an average |
| `adapter.safetensors` | what a run with an adapter trains, which is in `model.safetensors` too |
| `trainer.safetensors`, `trainer.json` | everything else a run needs to go on: optimizer, schedule, loops, position |
| `config.json` | the resolved configuration of the run |
| `manifest.json` | format, step, epoch, metrics, commit, versions, size and SHA-256 of every other file; written last |

What several processes have a share of stands in a file for each: `model-00001-of-00002.safetensors`, see `parts.py`.

`checkpoints/best` and `checkpoints/last` point to steps: a relative symbolic link, or a one-line text file where the
file system has no links. A directory without a manifest was never finished and does not count.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from conf.errors import UserError
from conf.files import opened
from models.checkpoints.format.config import legible
from models.checkpoints.format.door import CorruptCheckpoint, checked, read_json

FORMAT = 1
MODEL, EMA, ADAPTER = "model.safetensors", "ema.safetensors", "adapter.safetensors"
TENSORS, TRAINER = "trainer.safetensors", "trainer.json"
CONFIG, MANIFEST = "config.json", "manifest.json"
POINTERS = ("last", "best")
MAX_FILES, MAX_STEP = 2**18, 10**12  # of a manifest: three files of so many processes as there will be
_STEP = re.compile(r"step-(\d{8,})")


# A file that was written so few seconds before it was hashed may change again within one tick of its clock.
FRESH = 2.0
_hashed: dict[str, tuple[tuple[int, ...], str]] = {}


class OtherFormat(CorruptCheckpoint):
    """A checkpoint of a later version of this project: not damaged, but nothing that this version can read."""


def step_name(step: int) -> str:
    """The directory name of an optimizer step: `step-00000800`."""
    return f"step-{step:08d}"


def step_directories(directory: str | os.PathLike) -> dict[int, Path]:
    """All step directories below a `checkpoints` folder by step number, oldest first; {} where there is no folder."""
    try:
        entries = list(Path(directory).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    steps = {int(match[1]): entry for entry in entries if (match := _STEP.fullmatch(entry.name)) and entry.is_dir()}
    return dict(sorted(steps.items()))


def resolve(path: str | os.PathLike) -> Path:
    """The step directory that a path means: the directory itself, or where a `best` or `last` pointer points.

    The folder of a run means its best checkpoint, else its last.

    Raises:
        ValueError: there is nothing, or something else, at the path; the message lists the checkpoints near it.
    """
    path = Path(path)
    target = path = of_run(path)
    if path.name in POINTERS and path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise CorruptCheckpoint(f"checkpoint: {path} is a link that leads out of its folder; {nearby(path.parent)}")
    if path.is_file() and path.name in POINTERS:
        target = path.parent / _pointer_text(path)
    if not target.exists():
        raise UserError(f"checkpoint: there is nothing at this path, got {path}; {nearby(path)}")
    if not target.is_dir():
        raise UserError(f"checkpoint: this is a file and not a checkpoint directory, got {path}; {nearby(path)}")
    if not (target / MANIFEST).is_file():
        raise CorruptCheckpoint(f"checkpoint: this directory has no {MANIFEST}, got {path}; {nearby(path)}")
    return target.resolve()


def of_run(path: Path) -> Path:
    """The best checkpoint of a run, else its last, else the one of the highest step; any other path as it is."""
    folder = path / "checkpoints"
    if not folder.is_dir() or (path / MANIFEST).exists():
        return path
    found = [folder / name for name in ("best", "last") if (folder / name).exists()]
    return next(iter([*found, *reversed(step_directories(folder).values())]), path)


def _pointer_text(path: Path) -> str:
    """The step name in a text pointer; checked, so that a pointer never leads out of its folder."""
    with opened(path) as file:
        name = file.read(64).decode("ascii", "replace").strip()
    if not _STEP.fullmatch(name):
        raise CorruptCheckpoint(f"checkpoint: the pointer {path} must name a step, got {name!r}; {nearby(path)}")
    return name


def nearby(path: str | os.PathLike) -> str:
    """The second half of an error message: which checkpoints exist at, below or beside a path."""
    path = Path(path)
    for folder in (path, path / "checkpoints", path.parent, path.parent / "checkpoints", path.parent.parent):
        names = [name for name in POINTERS if (folder / name).exists()]
        names += [entry.name for entry in reversed(step_directories(folder).values())]
        if names:
            return f"choose one of {', '.join(names[:8])} in {folder}"
    return f"no checkpoint was found in {path.parent} either"


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a checkpoint (a step directory or a pointer): `step`, `epoch`, `metrics`, `files`, `versions`."""
    path = resolve(path)
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        kind = OtherFormat if type(found) is int and found > FORMAT else CorruptCheckpoint
        raise kind(f"checkpoint: {path} must have format {FORMAT}, got {found!r}; use another version")
    files = manifest.get("files")
    step = manifest.get("step")
    if not _well_formed(files) or type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CorruptCheckpoint(
            f"checkpoint: the manifest in {path} must list files and a step, got {str(files)[:200]} and step {step!r}; "
            f"{nearby(path)}"
        )
    return manifest


def _well_formed(files: Any) -> bool:
    """Whether a manifest lists files of its own folder, each with its size and its SHA-256."""
    return (
        isinstance(files, dict)
        and len(files) <= MAX_FILES
        and all(Path(name).name == name and isinstance(entry, dict) for name, entry in files.items())
        and all(type(e.get("bytes")) is int and isinstance(e.get("sha256"), str) for e in files.values())
    )


def verify(path: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Compares the files of a checkpoint with its manifest, and returns the manifest.

    Args:
        path: a step directory or a pointer.
        names: the files to check; default all that the manifest lists.

    Raises:
        CorruptCheckpoint: a file is missing, has another size or another content; the message names it.
    """
    path = resolve(path)
    manifest = read_manifest(path)
    for name in manifest["files"] if names is None else names:
        entry = manifest["files"].get(name)
        if entry is None:
            raise CorruptCheckpoint(f"checkpoint: {path} was saved without {name}, got {sorted(manifest['files'])}")
        if not (path / name).is_file():
            raise CorruptCheckpoint(f"checkpoint: {path / name} is missing; use another checkpoint: {nearby(path)}")
        found = file_entry(checked(path / name))
        if found != {"sha256": entry["sha256"], "bytes": entry["bytes"]}:
            raise CorruptCheckpoint(
                f"checkpoint: checksum mismatch in {path / name}: expected {entry['bytes']} bytes with SHA-256 "
                f"{str(entry['sha256'])[:12]}, got {found['bytes']} with {found['sha256'][:12]}; {nearby(path)}"
            )
    return manifest


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest stores them.

    A file that stands since is not read again by this process: a resumed run looks at its checkpoint several times.

    Raises:
        CorruptCheckpoint: it cannot be read.
    """
    try:
        with opened(path) as file:
            mark = _mark(file)
            known = _hashed.get(str(path))
            if known is not None and known[0] == mark:
                return {"sha256": known[1], "bytes": mark[2]}
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if mark == _mark(file) and time.time() - max(mark[3:]) / 1e9 > FRESH:
                _hashed[str(path)] = mark, digest
            return {"sha256": digest, "bytes": mark[2]}
    except OSError as error:
        raise CorruptCheckpoint(f"checkpoint: {path} cannot be read, got {error}; {nearby(path.parent)}") from error


def _mark(file: IO[bytes]) -> tuple[int, ...]:
    """What changes with a file: where it is, its size, and when its content and anything of it were changed last."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The configuration that a checkpoint was trained with. It is data from a file: `check_config` it before use."""
    path = resolve(path)
    verify(path, [CONFIG])
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise CorruptCheckpoint(f"checkpoint: {path / CONFIG} must hold a mapping, got {type(config).__name__}")
    return legible(config)


def latest(directory: str | os.PathLike, report: Callable[[str], None] | None = None) -> Path | None:
    """The valid step directory with the highest step number in a `checkpoints` folder; None where there is no step.

    Step numbers decide and never the clock. Each newer but damaged step is passed to `report` as one line.

    Raises:
        OtherFormat: a newer step was written by a later version, so that going on from an older one would lose it.
        CorruptCheckpoint: there are steps, and none can be read: they are never taken for a new run.
    """
    problems = []
    try:
        steps = step_directories(directory)
        for path in reversed(steps.values()):
            try:
                verify(path)
            except OtherFormat:
                raise
            except CorruptCheckpoint as error:
                problems.append(str(error))
            else:
                for problem in problems if report is not None else ():
                    report(f"skipping a damaged checkpoint: {problem}")
                return path.resolve()
        if not any(any(path.iterdir()) for path in steps.values()):
            return None
    except OSError as error:
        problems.append(f"checkpoint: {directory} cannot be read, got {error}")
    raise CorruptCheckpoint(
        f"{problems[0].partition('; choose one of')[0]}; no checkpoint in {directory} can be read, so nothing is "
        "started and nothing deleted: mend or move them, or give another run.name"
    )
