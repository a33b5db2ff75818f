"""A share of every class, by name: which images are held out, and which are a part of the data.

Each image has a number, the hash of the seed, the purpose and its name; of a class those with the lowest are taken. So
the choice is the same on every platform and in any order, and when files are added all but a few others stay where
they were.
"""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from conf.errors import UserError

HOLD_OUT, SUBSET = "validation", "subset"  # the purpose is part of the hash, so a subset is not what was held out


def held_out(labels: np.ndarray, names: Sequence[str | bytes], fraction: float, seed: int) -> np.ndarray:
    """Which images are for validation, bool (len,): round(fraction · n) of each class of n images.

    At least one is, and one stays, where a class has two or more; of a class with one image none is. With `fraction`
    1 all are.
    """
    if fraction == 1:
        return np.ones(len(labels), bool)
    return _lowest(labels, names, seed, HOLD_OUT, lambda n: min(n - 1, max(1, int(fraction * n + 0.5))))


def part(labels: np.ndarray, names: Sequence[str | bytes], size: str | int, seed: int) -> np.ndarray:
    """Positions, rising, of a part of the images: a share (`10%`, at least one of each class) or so many per class.

    A larger part holds a smaller one.
    """
    if isinstance(size, str):
        fraction = float(size.rstrip("% ")) / 100
        chosen = _lowest(labels, names, seed, SUBSET, lambda n: max(1, int(fraction * n + 0.5)))
    else:
        chosen = _lowest(labels, names, seed, SUBSET, lambda n: min(n, size))
    return np.flatnonzero(chosen)


def check_fraction(value: object, key: str) -> float:
    """The share that is held out.

    Raises:
        ValueError: it is none above 0 and at most 1.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise UserError(f"{key}: must be a share above 0 and below 1 (1 evaluates all), got {value!r}; set {key}=0.2")
    return float(value)


def _lowest(
    labels: np.ndarray, names: Sequence[str | bytes], seed: int, purpose: str, count: Callable[[int], int]
) -> np.ndarray:
    """Of every class of n images the `count(n)` with the lowest hash, bool (len,)."""
    chosen = np.zeros(len(labels), bool)
    if len(labels) == 0:
        return chosen
    hashes = np.fromiter((_hash(name, seed, purpose) for name in names), np.uint64, len(labels))
    order = np.lexsort((hashes, labels))  # by class, then by hash
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0])
    for start, end in zip(starts, [*starts[1:], len(labels)], strict=True):
        chosen[order[start : start + count(int(end - start))]] = True
    return chosen


def _hash(name: str | bytes, seed: int, purpose: str) -> int:
    text = os.fsdecode(name).replace(os.sep, "/")
    text = text if text.isascii() else unicodedata.normalize("NFC", text)  # as some file systems do to names
    key = f"{seed}/{purpose}/{text}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
