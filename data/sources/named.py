"""Data sets that have a name: CIFAR, Flowers-102, Pets, Food-101, FashionMNIST, Imagenette, by torchvision.

torchvision downloads, verifies and lists them; images are decoded here, as those of all sources. A data set is
downloaded by one process, once, and only where it is not in its folder yet.
"""

import contextlib
import fcntl
import inspect
import os
import socket
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from conf.folders import printable
from conf.values import choice, flag
from data.sources.array_split import ArraySplit
from data.sources.imagefolder import FolderSplit

# torchvision's class, and what lies in the root once it is downloaded
SETS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "flowers102": ("Flowers102", "flowers-102"),
    "food101": ("Food101", "food-101"),
    "imagenette": ("Imagenette", "imagenette2*"),
    "pets": ("OxfordIIITPet", "oxford-iiit-pet"),
}
CACHE = "~/.cache/vision-zoo"
TIMEOUT = 30  # seconds that a server may be silent


class NamedSet:
    """One of the data sets above; torchvision is asked when a split is first needed.

    Args:
        name: one of `SETS`.
        root: the folder that holds it, or where it is downloaded to; `~/.cache/vision-zoo` when `None`.
        train, val: names of its splits, `train`, `val`, `trainval` or `test`; of several a list.
        download: fetch it where it is not there.
        options: others of torchvision's class, e.g. the `size` of Imagenette.
    """

    embedded = False

    def __init__(
        self,
        name: str,
        root: str | os.PathLike | None = None,
        train: str | Sequence[str] = "train",
        val: str | Sequence[str] = "test",
        download: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name = choice("data.source", "name", name, SETS, fix="choose one of them")
        self.root = os.path.expanduser(CACHE if root is None else root)
        self.names = {"train": train, "val": val}
        self.download = flag("data.source", "download", download, fix="set data.source.download=true or false")
        self.options = dict(options or {})
        if own := {"root", "download"} & self.options.keys():
            raise UserError(
                f"data.source: options must be others of torchvision's class, got {sorted(own)[0]}; set data.root or "
                "data.source.download"
            )

    @cached_property
    def train(self) -> ArraySplit | FolderSplit:
        return _joined(self._sets("train"))

    @cached_property
    def val(self) -> ArraySplit | FolderSplit:
        return _joined(self._sets("val"))

    @cached_property
    def classes(self) -> list[str]:
        names = self._sets("val")[0].classes
        return [name if isinstance(name, str) else name[0] for name in names]  # of synonyms the first

    def _sets(self, part: str) -> list[Any]:
        """torchvision's objects of one part, one per split that it is made of."""
        names = [self.names[part]] if isinstance(self.names[part], str) else list(self.names[part])
        return [
            self._opened[name] if name in self._opened else self._opened.setdefault(name, self._open(name))
            for name in names
        ]

    @cached_property
    def _opened(self) -> dict[str, Any]:
        return {}

    def _open(self, split: str) -> Any:
        """Opens a split; downloads the set first where it has to be."""
        from torchvision import datasets

        make = getattr(datasets, SETS[self.name][0])
        chosen = {"train": split == "train"} if "train" in inspect.signature(make).parameters else {"split": split}
        if "train" in chosen and split not in ("train", "test"):
            raise UserError(f"data.source: {self.name} has the splits train and test, got {split}; choose one of them")
        try:
            return make(self.root, **chosen, **self.options)
        except RuntimeError as error:  # not there, or not whole
            if not self.download:
                raise self._not_there(str(error).partition(".")[0]) from error
        except (ValueError, TypeError) as error:
            raise UserError(f"data.source: {self.name} cannot be opened so: {error}") from error
        try:
            with _alone(self.root), _patience():
                return make(self.root, **chosen, **self.options, download=True)
        except (RuntimeError, OSError) as error:
            reason = next(iter(str(error).splitlines()), repr(error))
            raise self._not_there(f"could not be downloaded ({reason})") from error

    def _not_there(self, why: str) -> UserError:
        return UserError(
            f"data.root: {self.name} is not in {printable(self.root)} and {why}; run once with a network, or set "
            f"data.root to a folder that holds {SETS[self.name][1]}"
        )


def _joined(sets: list[Any]) -> ArraySplit | FolderSplit:
    """The images of one or several objects of torchvision, without decoding them."""
    labels = np.concatenate([np.asarray(_first(one, "targets", "_labels", "_samples"), np.int64) for one in sets])
    if hasattr(sets[0], "data"):
        return ArraySplit(np.concatenate([np.asarray(one.data) for one in sets]), labels)
    files = [os.fsencode(file) for one in sets for file in _first(one, "_image_files", "_images", "_samples", place=0)]
    return FolderSplit.of(os.fspath(sets[0].root), np.array(files, np.bytes_), labels)


def _first(one: Any, *names: str, place: int = 1) -> Sequence[Any]:
    """The first of these lists that an object has; of pairs of file and label one of the two."""
    values = next(getattr(one, name) for name in names if hasattr(one, name))
    return [value[place] for value in values] if len(values) and isinstance(values[0], tuple) else values


@contextlib.contextmanager
def _alone(root: str) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    Path(root).mkdir(parents=True, exist_ok=True)
    with open(os.path.join(root, ".download.lock"), "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """torchvision would wait for ever for a server that says nothing."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
