"""Where something can be written: the place where it belongs, else one that is said; and names that are not taken."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from conf.errors import UserError
from conf.names import short


def writable(folder: Path) -> tuple[Path, list[str]]:
    """The folder, else one of its name in the working directory, else in that for temporary files; made where needed.

    Returns:
        The place, and what to say about it where it is not `folder`.

    Raises:
        UserError: nothing can be written anywhere.
    """
    reason = ""
    for place in (folder, Path.cwd() / folder.name, Path(tempfile.gettempdir()) / folder.name):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            reason = reason or f"{short(folder)} cannot be written ({error.strerror})"
        else:
            return place, [f"{reason}: what belongs there goes to {short(place)}"] if reason else []
    raise UserError(f"eval: {reason}, nor can the working directory or {tempfile.gettempdir()}; give output=<folder>")


def numbered(path: Path) -> Iterator[Path]:
    """The path itself, then with 2, 3 … behind its stem."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
