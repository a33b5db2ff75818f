"""New files on a disk: hashed while they are written, flushed, with the permissions that the umask gives."""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_CHUNK = 8 * 2**20  # bytes between two looks at the checksum


class NewFile:
    """A file that must not exist yet; `entry` is what a manifest says of it, once it is closed.

    Args:
        path: where.

    Raises:
        OSError: it exists, or it could not be written completely.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._hash, self._bytes = path, hashlib.sha256(), 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, content: bytes | memoryview) -> None:
        """All of it, whatever the system takes at once."""
        view = memoryview(content)
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._hash.update(chunk)
            done = 0
            while done < len(chunk):
                done += os.write(self._descriptor, chunk[done:])
        self._bytes += len(view)

    @property
    def entry(self) -> dict[str, Any]:
        """Size and SHA-256."""
        return {"sha256": self._hash.hexdigest(), "bytes": self._bytes}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                os.fsync(self._descriptor)
                found = os.fstat(self._descriptor).st_size
                if found != self._bytes:
                    raise OSError(f"{self._path} must have {self._bytes} bytes, got {found}; the storage lost some")
        finally:
            os.close(self._descriptor)


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """A new file with this content; returns its size and SHA-256.

    Raises:
        OSError: see `NewFile`.
    """
    with NewFile(path) as file:
        file.write(content)
    return file.entry


def sync(path: Path) -> None:
    """Flushes a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
