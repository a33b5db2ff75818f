"""Class folders on disk: `<root>/{train,val}/<class>/…` or `<root>/<class>/…`, looked at without anything heavy.

The number of classes is needed while a configuration is composed, before torch is imported.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from conf.errors import UserError

# what Pillow reads of still pictures; other suffixes are left out, and the run says so
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".avif", ".avifs"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    *(".tga", ".qoi", ".pcx", ".psd", ".sgi", ".dds", ".ico", ".icns"),
    ".npy",  # pixels (H, W) or (H, W, C)
)
TREE = "<root>/train/<class>/<image> and <root>/val/<class>/<image>, or <root>/<class>/<image> to be split"
TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "test", "testing")  # the first that is there
JUNK = ("__MACOSX", "@eaDir", "lost+found", "System Volume Information")  # folders that no person made
SETTINGS = ("root", "classes", "split", "source.train", "source.file", "source.label", "source.separator")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # directions of text too
SHOWN = 8  # entries named when a folder is not what it should be


class Layout(NamedTuple):
    """Where the class folders are: those of `train` and of `val`, or of one of them where the other is not there."""

    train: Path | None
    val: Path | None
    flat: bool  # they lie in the root itself


def layout(root: str | os.PathLike | None) -> Layout:
    """How the images below a root lie.

    Raises:
        ValueError: no root, no such folder, no class folders in it; says where it looked and what is there.
    """
    if not root:
        raise UserError(f"data.root: no image folder, got {root!r}; set data.root=<root>, where images lie as {TREE}")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise _nothing(folder, root)
    train, val = _split_folder(folder, TRAIN), _split_folder(folder, VAL)
    if train is not None or val is not None:
        return Layout(train, val, flat=False)
    classes = _class_names(folder)
    if not any(next(image_files(folder / name), None) for name in classes if name not in (*TRAIN, *VAL)):
        lacking = _no_classes if (folder / "train").is_dir() else _nothing
        raise lacking(folder / "train", root)
    for name in classes:
        parts = (folder / name / part for part in (*TRAIN, *VAL))
        if any(part.is_dir() and _class_names(part) for part in parts):
            raise UserError(
                f"data.root: {printable(folder / name)} holds train/ or val/, so it is a root and not a class, got "
                f"data.root={root}; set data.root={printable(folder / name)}"
            )
    return Layout(folder, None, flat=True)


def count_class_folders(
    root: str | os.PathLike | None,
    classes: str | os.PathLike | None = None,
    split: str | os.PathLike | None = None,
    *columns: str | None,
) -> int:
    """Number of classes: those of a file that names them, of a list of files, or else the class folders.

    Args:
        root: the folder of images.
        classes: the file that names them.
        split: a `split.csv`.
        columns: of images by a list: the list, its columns of files and labels, what separates several labels.

    Raises:
        ValueError: a list in the place of one of them, and as `layout` and `conf.lists` do.
    """
    from conf.lists import count_listed

    for name, value in zip(SETTINGS, (root, classes, split, *columns), strict=False):
        if isinstance(value, Collection) and not isinstance(value, str):
            what = "a file of class names, one a line, or imagenet" if name == "classes" else "one text"
            raise UserError(f"data.{name}: must be {what}, got {value}; set data.{name}")
    if classes is not None or split is not None or (columns and (columns[0] is not None or not root)):
        return count_listed(classes, split, *columns)
    places = layout(root)
    return len(classes_in(places.train or places.val, root))


def class_split(root: str | os.PathLike | None) -> str:
    """The split whose folders are the classes: `train`, or `val` where there is no `train`, for evaluation."""
    lone = bool(root) and Path(root, "val").is_dir() and not Path(root, "train").is_dir()
    return "val" if lone else "train"


def class_folders(root: str | os.PathLike | None, split: str) -> list[str]:
    """Sorted names of the class folders in `root/split`; names that begin with a dot are not classes.

    Raises:
        ValueError: no root, no such folder, no split in it, no class in that; says where it looked and what is there.
    """
    if not root:
        raise UserError(f"data.root: no image folder, got {root!r}; set data.root=<root>, where images lie as {TREE}")
    folder = Path(root).expanduser()
    for part in (folder, folder / split):
        if not part.is_dir():
            raise _nothing(part, root)
    return classes_in(folder / split, root)


def classes_in(folder: Path, root: str | os.PathLike) -> list[str]:
    """Sorted names of the class folders in a folder below `root`.

    Raises:
        ValueError: there are none, or one has a name that is no text.
    """
    names = _class_names(folder)
    if not names:
        raise _no_classes(folder, root)
    for name in names:
        if not name.isprintable() and "\udc7f" < max(name) < "\ue000":  # bytes that are no UTF-8
            raise UserError(
                f"data.root: a class folder must have a name in UTF-8, got {printable(name)} in {folder}; rename it"
            )
    return names


def image_files(
    folder: str | os.PathLike, left_out: list[str] | None = None, walked: list[str] | None = None
) -> Iterator[str]:
    """Paths of the images under `folder`, relative to it, at any depth, sorted; hidden files are left out.

    A link to a folder that was walked already, or that holds `folder`, is not followed. Files of other suffixes are
    added to `left_out`, every folder to `walked`.

    Raises:
        ValueError: a folder cannot be read.
    """
    seen = {_identity(place) for place in (folder, *Path(os.path.abspath(folder)).parents[:2])}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        if walked is not None:
            walked.append(place)
        folders[:] = sorted(name for name in folders if name not in JUNK and not name.startswith("."))
        folders[:] = [name for name in folders if not _known(os.path.join(place, name), seen)]
        inside = os.path.relpath(place, folder)
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = name if inside == "." else os.path.join(inside, name)
            if name.lower().endswith(EXTENSIONS):
                yield path
            elif left_out is not None:
                left_out.append(path)


def suffixes(files: Iterable[str]) -> str:
    """How many files there are of each suffix, the most first: "9 .heic, 1 .txt"."""
    counts: dict[str, int] = {}
    for file in files:
        suffix = os.path.splitext(file)[1].lower() or "without a suffix"
        counts[suffix] = counts.get(suffix, 0) + 1
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {printable(suffix)}" for suffix, count in most)


def printable(path: str | os.PathLike) -> str:
    """A path as it can be printed on one line: bytes that are no text and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return escaped(text)


def escaped(text: str, keep: str = "") -> str:
    """A text of somebody else's for the terminal: control characters, with which it could be steered, as `\\x1b`."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def _split_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first folder of these names, in any case, that holds folders: one that holds images alone is a class."""
    found = {}
    for entry in sorted(_visible(folder), key=lambda entry: entry.name, reverse=True):
        if entry.name.lower() in names and entry.is_dir():
            found[entry.name.lower()] = Path(entry.path)
    for name in names:
        if name in found and _class_names(found[name]):
            return found[name]
    return None


def _class_names(folder: Path) -> list[str]:
    """Folders in a folder, sorted, but for those that lead back to it or to what holds it."""
    above = {_identity(place) for place in (folder, *Path(os.path.abspath(folder)).parents[:1])}
    folders = [entry for entry in _visible(folder) if entry.name not in JUNK and entry.is_dir()]
    return sorted(entry.name for entry in folders if not (entry.is_symlink() and _identity(entry.path) in above))


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _known(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder was seen before; it is from now on."""
    identity = _identity(folder)
    known = identity in seen
    seen.add(identity)
    return known


def _visible(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        _unreadable(error)
        raise


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"data.root: a folder cannot be read, got {printable(error.filename)} ({error.strerror}); "
        "give it permissions, or move it away"
    ) from error


def _nothing(folder: Path, root: str | os.PathLike) -> UserError:
    return UserError(
        f"data.root: no folder {folder}, got data.root={root} ({_contents(folder.parent)}); images must lie as {TREE}"
    )


def _no_classes(folder: Path, root: str | os.PathLike) -> UserError:
    return UserError(
        f"data.root: no class folders in {folder}, got data.root={root} ({_contents(folder)}); "
        f"images must lie as {TREE}"
    )


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} does not exist"
    names = sorted(printable(entry.name) + "/" * entry.is_dir() for entry in _visible(folder))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{folder} holds {', '.join(names[:SHOWN]) + more if names else 'nothing'}"
