"""What lies below a folder of images, kept in a file: a tree of millions of names is walked once.

The index of a split is a folder of NumPy arrays, which processes share through the page cache, and a JSON file that
says when every folder that was walked was last changed. A file that is added, removed or renamed changes its folder, so
an index is good as long as no folder has another time; one that was changed as the index was written is not trusted.

It lies in `$XDG_CACHE_HOME/vision-attention-zoo` (`~/.cache` where that is not set), or in the folder that is given,
under a hash of the tree's path and its classes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.errors import UserError
from conf.folders import image_files

VERSION = 1
FEW = 50_000  # images below which a tree is read as quickly as its index
SETTLED = 2_000_000_000  # nanoseconds after which a folder that has the same time has the same content


class Listing(NamedTuple):
    """Files of a split as bytes, relative to its folder, their labels, and files that are no images by their suffix."""

    files: np.ndarray
    labels: np.ndarray
    left_out: list[str]


def listed(folder: str, classes: Sequence[str], where: str | os.PathLike | None = "auto") -> Listing:
    """The images in the class folders of a folder, from its index where there is a good one.

    Args:
        where: the folder for indices, `auto` for the user's cache, None for no index.

    Raises:
        UserError: a folder cannot be read, or that for indices is none.
    """
    place = _place(folder, classes, where)
    if place is None:
        return walked(folder, classes)[0]
    if (found := _read(place)) is not None:
        return found
    with _in_turn(place):
        if (found := _read(place)) is not None:
            return found
        began = time.time_ns()
        listing, folders = walked(folder, classes, _progress())
        if len(listing.files) >= FEW or where != "auto":
            with contextlib.suppress(OSError):  # a full or read-only disk: the next start walks again
                _write(place, listing, folders, began)
        return listing


def walked(
    folder: str, classes: Sequence[str], progress: Callable[[int], None] = lambda _: None
) -> tuple[Listing, dict[str, int]]:
    """The same from the folders themselves, and when each of them was changed, in nanoseconds."""
    files: list[bytes] = []
    labels: list[int] = []
    left_out: list[str] = []
    folders = [folder] if os.path.isdir(folder) else []
    for label, name in enumerate(classes):
        place = os.path.join(folder, name)
        if not os.path.isdir(place):
            continue  # validation may lack classes
        before = len(files)
        files += [os.fsencode(os.path.join(name, file)) for file in image_files(place, left_out, folders)]
        labels += [label] * (len(files) - before)
        progress(len(files))
    times = {name: os.stat(name).st_mtime_ns for name in folders}
    return Listing(np.array(files, dtype=np.bytes_), np.array(labels, dtype=np.int64), left_out), times


def _place(folder: str, classes: Sequence[str], where: str | os.PathLike | None) -> Path | None:
    if where is None:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vision-attention-zoo")
    parent = cache if where == "auto" else Path(where).expanduser()
    if where != "auto":
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.source.index: the folder cannot be made, got {where} ({error.strerror}); give another, or null"
            ) from error
    said = "\0".join([str(VERSION), os.path.abspath(folder), *classes]).encode(errors="surrogateescape")
    return parent / f"index-{hashlib.sha256(said).hexdigest()[:16]}"


def _read(place: Path) -> Listing | None:
    """What an index says, or None where it is not there, broken, or older than its tree."""
    try:
        said = json.loads((place / "index.json").read_bytes())
        if any(os.stat(name).st_mtime_ns != changed for name, changed in said["folders"].items()):
            return None
        files, labels = (_array(place / f"{name}.npy") for name in ("files", "labels"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = files.dtype.kind == "S" and labels.dtype == np.int64 and len(files) == len(labels) == said["images"]
    return Listing(files, labels, list(said["left_out"])) if whole else None


def _array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write(place: Path, listing: Listing, folders: dict[str, int], began: int) -> None:
    """Written beside its place and renamed, so that a reader finds the old one or the new one."""
    if any(changed > began - SETTLED for changed in folders.values()):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f".{place.name}-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        np.save(new / "files.npy", listing.files)
        np.save(new / "labels.npy", listing.labels)
        said = {"images": len(listing.files), "folders": folders, "left_out": listing.left_out}
        (new / "index.json").write_text(json.dumps(said))
        if place.exists():
            old = place.with_name(f".{place.name}-{os.getpid()}-old")
            place.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        new.rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _in_turn(place: Path) -> Iterator[None]:
    """Of several processes of a run one walks while the others wait; where nothing can be locked all walk."""
    with contextlib.ExitStack() as stack:
        if "LOCAL_RANK" in os.environ:
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context(place.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


def _progress() -> Callable[[int], None]:
    """A line every ten seconds of a walk that takes so long."""
    last = time.monotonic()

    def tell(count: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"data: {count:,} images found so far; the next start takes them from an index", flush=True)

    return tell
