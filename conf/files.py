"""Files: those of others opened with care, our own written whole or not at all.

A pipe, a socket or a device is refused, not waited for, and sizes are bounded.
"""

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from conf.errors import UserError


def opened(path: str | os.PathLike) -> BinaryIO:
    """An ordinary file to be read. Nothing else is opened so that it waits, or acts on a device.

    Raises:
        OSError: there is none, or it is something else.
    """
    return open(path, "rb", opener=_ordinary)


def _ordinary(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # of a pipe without a writer: at once
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # of a folder Python says so itself
        return descriptor
    os.close(descriptor)
    raise OSError(f"it is {_KINDS.get(stat.S_IFMT(mode), 'no ordinary file')}, not a file")


_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def contents(path: str | os.PathLike, at_most: int) -> bytes:
    """All of an ordinary file.

    Raises:
        OSError: there is none, or it is something else.
        UserError: it has more bytes.
    """
    with opened(path) as file:
        found = file.read(at_most + 1)
    if len(found) > at_most:
        raise UserError(f"{path}: must have at most {at_most} bytes, got more; it is no file of ours")
    return found


def inside(folder: Path, name: str) -> Path:
    """An ordinary file in a folder of somebody else's. A link may only lead to a file below it.

    In a snapshot of Hugging Face's cache it may also lead to the `blobs` of that repository.

    Raises:
        OSError: there is none, it is something else, or a link leads out of the folder.
    """
    path = folder / name
    ends = [folder.resolve()]
    if folder.parent.name == "snapshots":
        ends.append(folder.parent.parent.resolve() / "blobs")
    if path.is_symlink() and not any(path.resolve().is_relative_to(end) for end in ends):
        raise OSError(f"{path} is a link that leads out of its folder")
    with opened(path):
        return path


def put(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: beside its place first, then there. Links are replaced, not followed.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    data = content.encode(errors="replace") if isinstance(content, str) else content
    waiting = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        waiting.unlink(missing_ok=True)
        with waiting.open("xb") as file:  # a link of that name, in the folder of somebody else, is not followed
            file.write(data)
        waiting.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            waiting.unlink()
        raise
