"""Writes a checkpoint directory so that a kill or a full disk at any moment leaves either the old state or the new.

Everything goes into a hidden directory beside the target, is flushed to the disk, and is then renamed. Removing is a
rename to a hidden name first. Hidden leftovers of killed processes are recovered if complete, and swept otherwise.
"""

import contextlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from models.checkpoints.format.directory import FORMAT, MANIFEST, CorruptCheckpoint, file_entry, verify

_WRITING, _TRASH = ".writing-", ".trash-"


def write_checkpoint(path: Path, tensors: dict[str, dict[str, Tensor]], plain: dict[str, Any], manifest: dict) -> None:
    """Writes one checkpoint directory, replacing one of the same name.

    Args:
        path: the step directory to create.
        tensors: contents of the safetensors files, by file name.
        plain: contents of the JSON files, by file name.
        manifest: `step`, `epoch`, `metrics`, `commit` and `versions`; format and checksums are added here.

    Raises:
        OSError: nothing of the new checkpoint remains, and an older one of that name is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_WRITING}{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, content in tensors.items():
            save_tensors(content, temporary / name)
        for name, content in plain.items():
            _write(temporary / name, json.dumps(content, allow_nan=False).encode())
        files = {name: file_entry(temporary / name) for name in [*tensors, *plain]}
        text = json.dumps({"format": FORMAT, **manifest, "files": files}, indent=1, allow_nan=False)
        _write(temporary / MANIFEST, text.encode())
        sync(temporary)
        _replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A new safetensors file, flushed to the disk, with the permissions that every other new file gets.

    Raises:
        OSError: it could not be written.
    """
    with path.open("wb"):
        mode = path.stat().st_mode  # as the umask has it; safetensors lets only the owner read
    try:
        safetensors.torch.save_file(tensors, path, metadata)
        path.chmod(stat.S_IMODE(mode))
    except Exception as error:
        # safetensors reports a full disk as its own error; the caller handles storage errors by their type.
        if any(words in str(error) for words in ("I/O error", "os error", "IoError")):  # IoError: older
            raise OSError(f"{path.name}: {error}") from error
        raise
    sync(path)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: Path, path: Path) -> None:
    """Renames a finished directory to its place. Of an older one there, nothing is deleted before the new one stands.

    A directory cannot be renamed over another one. A kill between the two renames leaves both directories complete
    under hidden names, and `recover` puts the new one in place.
    """
    if not path.exists():
        os.rename(temporary, path)
        sync(path.parent)
        return
    old = path.with_name(f"{_TRASH}{path.name}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flushes a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint: renamed first, so that a half-deleted directory never looks like a checkpoint."""
    trash = path.with_name(f"{_TRASH}{path.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def point(pointer: Path, target: Path) -> None:
    """Makes `best` or `last` point to a step directory beside it, in one atomic step."""
    temporary = pointer.with_name(f"{_WRITING}{pointer.name}-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        temporary.symlink_to(target.name)
    except OSError:
        _write(temporary, f"{target.name}\n".encode())
    os.replace(temporary, pointer)
    sync(pointer.parent)


def recover(directory: Path) -> None:
    """Puts a complete checkpoint, whose writer was killed just before the last rename, in its place.

    Complete is what its own checksums confirm: a writer killed in the middle leaves an unfinished manifest.
    """
    for entry in sorted(directory.glob(f"{_WRITING}step-*")):
        path = entry.with_name(entry.name.removeprefix(_WRITING).rpartition("-")[0])
        if path.exists():
            continue
        with contextlib.suppress(CorruptCheckpoint, OSError):  # OSError: another rank was faster
            verify(entry)
            os.rename(entry, path)


def sweep(directory: Path) -> None:
    """Deletes what killed writers left behind. Only the process that owns the folder may call it."""
    recover(directory)
    for prefix in (_WRITING, _TRASH):
        for entry in directory.glob(f"{prefix}*"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def probe(directory: Path) -> None:
    """Writes, flushes, renames and deletes a small file: what a save will need from this folder.

    Raises:
        OSError: the folder cannot be created or written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporary, final = (directory / f"{_WRITING}probe-{kind}-{os.getpid()}" for kind in ("a", "b"))
    try:
        _write(temporary, b"probe\n")
        os.rename(temporary, final)
        sync(directory)
    finally:
        temporary.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
