"""Writes a checkpoint directory so that a kill or a full disk at any moment leaves either the old state or the new.

Everything goes into a hidden directory beside the target, is flushed to the disk, and is then renamed. Removing is a
rename to a hidden name first. Hidden leftovers of killed processes are recovered if complete, and swept otherwise.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.checkpoints.format.directory import FORMAT, MANIFEST, CorruptCheckpoint, verify
from models.checkpoints.format.disk import sync, write_file
from models.checkpoints.format.tensors import save_tensors

_WRITING, _TRASH = ".writing-", ".trash-"


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    plain: Mapping[str, Any],
    manifest: Mapping[str, Any],
    standing: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes one checkpoint directory, replacing one of the same name.

    Several processes do the same in parts: `begin` on one, `write_tensors` on each, `commit` on one.

    Args:
        path: the step directory to create.
        tensors: contents of the safetensors files, by file name.
        plain: contents of the JSON files, by file name.
        manifest: `step`, `epoch`, `metrics`, `commit` and `versions`; format and checksums are added here.
        standing: sizes and checksums of the files of tensors in the directory that is replaced, where it holds these
            very tensors: they are linked and not written again.

    Returns:
        Sizes and checksums of the files of tensors.

    Raises:
        OSError: nothing of the new checkpoint remains, and an older one of that name is still there.
    """
    temporary = begin(path)
    try:
        files = link(path, temporary, standing or {}) or write_tensors(temporary, tensors)
        commit(temporary, path, files, plain, manifest)
    except BaseException:
        discard(temporary)
        raise
    return files


def begin(path: Path) -> Path:
    """The hidden directory in which the checkpoint `path` is made; `commit` or `discard` ends it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_WRITING}{path.name}-{os.getpid()}")
    discard(temporary)
    os.mkdir(temporary)
    return temporary


def write_tensors(temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Writes files of tensors into what `begin` made; returns their sizes and checksums for `commit`."""
    return {name: save_tensors(content, temporary / name) for name, content in tensors.items()}


def commit(
    temporary: Path,
    path: Path,
    files: Mapping[str, dict[str, Any]],
    plain: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Writes the rest, the manifest last, and puts the directory in its place.

    Args:
        temporary: what `begin` made.
        path: of the checkpoint.
        files: sizes and checksums of all files of tensors in it, whichever process wrote them.
        plain, manifest: as for `write_checkpoint`.
    """
    texts = {name: json.dumps(content, allow_nan=False).encode() for name, content in plain.items()}
    files = {**files, **{name: write_file(temporary / name, text) for name, text in texts.items()}}
    text = json.dumps({"format": FORMAT, **manifest, "files": files}, indent=1, allow_nan=False)
    write_file(temporary / MANIFEST, text.encode())
    sync(temporary)
    _replace(temporary, path)


def discard(temporary: Path) -> None:
    """Deletes what `begin` made."""
    shutil.rmtree(temporary, ignore_errors=True)


def link(path: Path, temporary: Path, standing: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Takes files over from the directory that is replaced; none of them where one cannot be linked."""
    try:
        for name, entry in standing.items():
            os.link(path / name, temporary / name)
            if os.stat(temporary / name).st_size != entry["bytes"]:
                raise OSError(f"{path / name} has changed")
    except OSError:  # a file system without links, or somebody was at the files: they are written anew
        for name in standing:
            (temporary / name).unlink(missing_ok=True)
        return {}
    return dict(standing)


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
        write_file(temporary, f"{target.name}\n".encode())
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
        temporary.unlink(missing_ok=True)  # of a killed process of the same number
        write_file(temporary, b"probe\n")
        os.rename(temporary, final)
        sync(directory)
    finally:
        temporary.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
