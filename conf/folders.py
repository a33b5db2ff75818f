"""Class folders on disk: `<root>/{train,val}/<class>/…`, looked at without importing anything heavy.

The number of classes is needed while a configuration is composed, before torch is imported.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from conf.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
TREE = "<root>/train/<class>/<image> and <root>/val/<class>/<image>"
SHOWN = 8  # entries named when a folder is not what it should be


def count_class_folders(root: str | os.PathLike | None) -> int:
    """Number of class folders. Raises `ValueError` as `class_folders` does."""
    return len(class_folders(root, class_split(root)))


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
    folder = Path(root)
    for part in (folder, folder / split):
        if not part.is_dir():
            raise UserError(
                f"data.root: no folder {part}, got data.root={root} ({_contents(part.parent)}); "
                f"images must lie as {TREE}"
            )
    names = sorted(entry.name for entry in _visible(folder / split) if entry.is_dir())
    if not names:
        raise UserError(
            f"data.root: no class folders in {folder / split}, got data.root={root} ({_contents(folder / split)}); "
            f"images must lie as {TREE}"
        )
    return names


def image_files(folder: str | os.PathLike) -> Iterator[str]:
    """Paths of the images under `folder`, relative to it, at any depth, sorted; hidden files are left out."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        inside = os.path.relpath(place, folder)
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name)


def _visible(folder: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} does not exist"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in _visible(folder))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{folder} holds {', '.join(names[:SHOWN]) + more if names else 'nothing'}"
