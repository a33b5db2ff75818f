"""What a run writes besides its checkpoints: it may fail, that is said once, and training goes on."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.files import put

_said: set[str] = set()


def attempt(what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Calls; what goes wrong is said once for each `what` of a run, and then ignored.

    Args:
        what: the file or service, as it is said.
        call: what writes.
        args: for it.
        kwargs: for it.

    Returns:
        Whether it went well.
    """
    try:
        call(*args, **kwargs)
    except Exception as error:
        if what not in _said:
            _said.add(what)
            say(f"{what} failed ({reason(error)}); the run goes on")
        return False
    return True


def begin() -> None:
    """Lets everything be said anew: the runs of a sweep share a process."""
    _said.clear()


def say(text: str) -> None:
    """Prints a line to standard error, where there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """The first line of what an error says, of the system's only that: `No space left on device`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def put_figure(path: Path, figure: Any, dpi: int = 120) -> None:
    """Writes a figure of matplotlib's as a PNG, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    put(path, content.getvalue())


def append(path: Path, text: str) -> None:
    """Adds to the end of a file all of the text or nothing.

    Raises:
        OSError: it could not be written; the file is as long as before.
    """
    data = text.encode(errors="replace")
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise
