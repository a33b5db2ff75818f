"""What a data set is, wherever it lies: a run goes on with the data that it began with, or hears what has changed.

Of each split: how many images every class has and a digest of their names, the order of names and labels, the sizes of
up to `LOOKED_AT` files spread over it, and the beginnings of up to `LOOKED_INTO`, since asking for a million takes
minutes on a network drive: of larger sets a file that was replaced may not be noticed. The folder that all names are
relative to does not count. Digests find accidents; they are no protection from intent.

A split offers what it has: `files` (names as bytes), or `keys()` (a number per image, uint64); `sizes(places)` and
`contents(places)`, a number each.
"""

import os
import stat
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

LOOKED_AT, LOOKED_INTO = 10_000, 1_000  # images of a split whose sizes, and whose beginnings are compared
HEAD = 4096  # bytes
_ROWS = 1 << 16
_BASE, _INVERSE = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 2**64)


def fingerprint(classes: Sequence[str], **splits: Any) -> dict[str, Any]:
    """The fingerprint as plain data: `classes`, and of each split `images`, `counts`, `digests` and three more."""
    return {"classes": list(classes)} | {name: _of(split, len(classes)) for name, split in splits.items()}


def _of(split: Any, classes: int) -> dict[str, Any]:
    labels, (whole, last) = np.asarray(split.labels), _keys(split)
    if labels.ndim == 2:
        counts, digests = labels.sum(0), [last[column].sum(dtype=np.uint64) for column in labels.T.astype(bool)]
        labels = names_hashed(np.packbits(labels.astype(bool), axis=1).view(f"S{-(-labels.shape[1] // 8)}").ravel())[0]
    else:
        counts, digests = np.bincount(labels, minlength=classes), np.zeros(classes, np.uint64)
        np.add.at(digests, labels, last)
    return {
        "images": len(labels),
        "counts": counts.tolist(),
        "digests": [f"{int(digest):016x}" for digest in digests],
        "order": _digest(whole + _mixed(labels.astype(np.uint64))),
        "sizes": _digest(sizes_of(split).astype(np.uint64)),
        "contents": _digest(contents_of(split).astype(np.uint64)),
    }


def looked_at(images: int, most: int = LOOKED_AT) -> np.ndarray:
    """The places of the images whose sizes, or whose beginnings are compared."""
    return np.unique(np.linspace(0, images - 1, min(images, most)).round().astype(np.int64))


def sizes_of(split: Any) -> np.ndarray:
    """Bytes of the images at `looked_at`, int64; none where a split cannot say."""
    found = split.sizes(looked_at(len(split))) if hasattr(split, "sizes") else ()
    return np.array(list(found), np.int64)


def contents_of(split: Any) -> np.ndarray:
    """Numbers for what the images at `looked_at` begin with, int64; none where a split cannot say."""
    found = split.contents(looked_at(len(split), LOOKED_INTO)) if hasattr(split, "contents") else ()
    return np.array(list(found), np.int64)


def sizes_on_disk(paths: Sequence[str]) -> list[int]:
    """Bytes of files; −1 for one that is not there, which reading it reports."""
    found = []
    for path in paths:
        try:
            found.append(os.stat(path).st_size)
        except OSError:
            found.append(-1)
    return found


def heads_on_disk(paths: Sequence[str]) -> list[int]:
    """A number for what each file begins with; −1 for what is no file, or cannot be read."""
    found = []
    for path in paths:
        try:
            with open(path, "rb", opener=_without_waiting) as file:
                found.append(zlib.crc32(file.read(HEAD)) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else -1)
        except OSError:
            found.append(-1)
    return found


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # or a pipe would be waited for


def names_hashed(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number per name (bytes), of the whole name and of what follows its last slash: uint64 (n,) each."""
    width = max(names.dtype.itemsize, 1)
    powers = np.cumprod(np.full(width, _BASE, np.uint64), dtype=np.uint64)
    backwards = np.cumprod(np.r_[np.uint64(1), np.full(width, _INVERSE, np.uint64)], dtype=np.uint64)
    whole, last = np.empty(len(names), np.uint64), np.empty(len(names), np.uint64)
    for start in range(0, len(names), _ROWS):
        rows = np.ascontiguousarray(names[start : start + _ROWS]).view(np.uint8).reshape(-1, width)
        slash = rows == ord("/")
        begins = np.where(slash.any(1), width - slash[:, ::-1].argmax(1), 0)
        wide = rows.astype(np.uint64)
        whole[start : start + _ROWS] = wide @ powers
        wide[np.arange(width) < begins[:, None]] = 0
        last[start : start + _ROWS] = (wide @ powers) * backwards[begins]
    return _mixed(whole), _mixed(last)


def _keys(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that name the images, with the class folder and without."""
    if hasattr(split, "files"):
        return names_hashed(split.files)
    keys = split.keys() if hasattr(split, "keys") else np.arange(len(split), dtype=np.uint64)
    return (_mixed(np.asarray(keys, np.uint64)),) * 2


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers whose sums tell sets apart: the finaliser of SplitMix64."""
    with np.errstate(over="ignore"):
        x = numbers + np.uint64(_BASE)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _digest(numbers: np.ndarray) -> str:
    """One word for numbers in their order; "" for none."""
    if not len(numbers):
        return ""
    places = np.arange(len(numbers), dtype=np.uint64) * np.uint64(_BASE)
    return f"{int(_mixed(_mixed(numbers) + places).sum(dtype=np.uint64)):016x}"
