"""Tar shards in the form of WebDataset: of each sample an image `<key>.jpg` and its label, `<key>.cls` or `<key>.json`.

The shards are local and not compressed, so that an image is read where it lies: an index of the places of all members
is made once per shard and kept in `~/.cache/vision-zoo/shards`. Every sample has a position, so that the order is
exact, the same with any number of workers and processes, and resumed in the middle of an epoch: shards are shuffled
by seed and epoch, and the images of a few shards among each other (`data.order.sampler.by_blocks`).
"""

import glob
import os
import re
import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import product

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.folders import printable
from conf.lists import in_order, read_classes
from data.order.fingerprint import HEAD, names_hashed
from data.order.stratified import check_fraction, held_out
from data.sources.decode import UnreadableImage, read_image
from data.sources.form import RGB, Form
from data.sources.imagelist import numbered
from data.sources.shard_index import Index, index_of

MOST = 1_000_000  # shards that braces name
OPEN = 16  # shards that a process keeps open
SHOWN = 3  # samples named in a message


class ShardSplit:
    """Samples of some shards, in the order of the shards."""

    def __init__(self, shards: list[str], shard_of: np.ndarray, places: np.ndarray, labels: np.ndarray) -> None:
        self.shards, self.shard_of, self.places, self.labels = shards, shard_of, places, labels
        self._open: dict[tuple[int, int], int] = {}  # a file for each process and shard

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def blocks(self) -> np.ndarray:
        """Samples of each shard."""
        return np.bincount(self.shard_of, minlength=len(self.shards))

    def take(self, chosen: np.ndarray) -> "ShardSplit":
        """Some of the samples, by a mask or by rising positions."""
        return ShardSplit(self.shards, self.shard_of[chosen], self.places[chosen], self.labels[chosen])

    def keys(self) -> np.ndarray:
        """A number for each sample: of its shard, by its name, and its place in it (`data.order.fingerprint`)."""
        names = np.array([os.fsencode(os.path.basename(shard)) for shard in self.shards], np.bytes_)
        return names_hashed(names)[0][self.shard_of] + self.places[:, 0].astype(np.uint64)

    def sizes(self, places: np.ndarray) -> list[int]:
        """Bytes of some images."""
        return self.places[places, 1].tolist()

    def contents(self, places: np.ndarray) -> list[int]:
        """Numbers for what some images begin with."""
        chosen = zip(self.shard_of[places].tolist(), self.places[places].tolist(), strict=True)
        return [zlib.crc32(os.pread(self._file(shard), min(size, HEAD), at)) for shard, (at, size) in chosen]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index), int(self.labels[index])

    def read(self, index: int, form: Form = RGB) -> Image.Image | np.ndarray:
        """An image, in another form as an array."""
        shard, (offset, size) = int(self.shard_of[index]), self.places[index].tolist()
        name = f"{self.shards[shard]} at byte {offset}"
        try:
            content = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise UnreadableImage(f"webdataset: a shard cannot be read, got {name} ({error}); mend it") from error
        return read_image(content, name, form)

    def _file(self, shard: int) -> int:
        key = os.getpid(), shard
        if key not in self._open:
            for old in [other for other in self._open if other[0] == key[0]][: -OPEN + 1]:
                os.close(self._open.pop(old))
            self._open[key] = os.open(self.shards[shard], os.O_RDONLY)
        return self._open[key]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}


class WebDataset:
    """Tar shards; they are looked at when a split is first asked for.

    Args:
        train: shards: a path with `{000..009}`, `{a,b}`, `*`, a folder of `.tar` files, or a list of such.
        val: those of the validation samples; `None` holds out a share.
        classes: a file of class names in the order of the labels, or `imagenet`; those that occur when `None`.
        val_fraction: the share of every class that is held out without `val`; `None` for a fifth.
        seed: names what is held out.
    """

    embedded = False

    def __init__(
        self,
        train: str | Sequence[str] | None,
        val: str | Sequence[str] | None = None,
        classes: str | os.PathLike | None = None,
        val_fraction: float | None = None,
        seed: int = 0,
    ) -> None:
        self.given = {"train": train, "val": val}
        self.named, self.val_fraction, self.seed = classes, val_fraction, seed

    @cached_property
    def classes(self) -> list[str]:
        if self.named is not None:
            return read_classes(self.named)
        return in_order({label for index in self._indices["train"].values() for label in index.labels})

    @property
    def train(self) -> ShardSplit:
        return self._splits[0]

    @property
    def val(self) -> ShardSplit:
        return self._splits[1]

    def notes(self) -> list[str]:
        """How the samples were split, and what was left out."""
        shards = sum(len(indices) for indices in self._indices.values())
        counts = f"{shards} shards: {len(self.train)} images for training, {len(self.val)} for validation"
        held = f", {100 * self._fraction:.4g} % of each class by seed {self.seed}" if self.given["val"] is None else ""
        left_out = [
            f"{printable(os.path.basename(shard))}: {printable(key)}"
            for indices in self._indices.values()
            for shard, index in indices.items()
            for key in index.left_out
        ]
        few = f"{', '.join(left_out[:SHOWN])}{' …' * (len(left_out) > SHOWN)}"
        return [counts + held] + ([f"{len(left_out)} samples without image or label: {few}"] if left_out else [])

    @property
    def _fraction(self) -> float:
        return 0.2 if self.val_fraction is None else check_fraction(self.val_fraction, "data.val_fraction")

    @cached_property
    def _indices(self) -> dict[str, dict[str, Index]]:
        """Of each part its shards and what they hold."""
        parts = [part for part in ("train", "val") if part == "train" or self.given[part] is not None]
        return {
            part: {shard: index_of(shard) for shard in expanded(self.given[part], f"data.source.{part}")}
            for part in parts
        }

    @cached_property
    def _splits(self) -> tuple[ShardSplit, ShardSplit]:
        whole, names = self._split("train")
        if self.given["val"] is not None:
            if self.val_fraction is not None:
                raise UserError(
                    f"data.val_fraction: data.source.val names the validation shards, got {self.val_fraction}; "
                    "leave one of them out"
                )
            return whole, self._split("val")[0]
        chosen = held_out(whole.labels, names, self._fraction, self.seed)
        return whole.take(~chosen), whole.take(chosen)

    def _split(self, part: str) -> tuple[ShardSplit, list[str]]:
        """The samples of a part, and their names: shard and key."""
        indices = self._indices[part]
        labels = [label for index in indices.values() for label in index.labels]
        names = [f"{os.path.basename(shard)}/{key}" for shard, index in indices.items() for key in index.keys]
        shard_of = np.repeat(np.arange(len(indices)), [len(index.keys) for index in indices.values()])
        places = np.concatenate([index.places for index in indices.values()])
        numbers = numbered(labels, self.classes, None, f"data.source.{part}")
        return ShardSplit(list(indices), shard_of, places, numbers), names


def expanded(given: str | Sequence[str] | None, key: str) -> list[str]:
    """The files that a path with braces or wildcards, a folder, or a list of such means, in order, each once.

    Raises:
        ValueError: no file is meant, or one is not there.
    """
    found: list[str] = []
    for one in [given] if isinstance(given, str) else given or ():
        for path in _braces(os.path.expanduser(str(one))):
            if os.path.isdir(path):
                found += sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
            elif os.path.exists(path):
                found.append(path)
            elif any(sign in path for sign in "*?["):
                found += sorted(glob.glob(path))
            else:
                raise UserError(f"{key}: there is no shard {printable(path)}, got {given}; mend the path")
    if not found:
        raise UserError(
            f"{key}: no shards, got {given}; give a path such as 'shards/train-{{000..009}}.tar' or a folder"
        )
    return list(dict.fromkeys(found))


def _braces(path: str) -> list[str]:
    """A path for each value of its braces, `{000..009}` or `{a,b}`; those of the last ones change first."""
    between, braces, end, count = [], [], 0, 1
    for match in re.finditer(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", path):
        first, last, words = match.groups()
        numbers = range(int(first), int(last) + 1) if words is None else ()
        count = max(count, 1) * (len(numbers) if words is None else words.count(",") + 1)
        if count > MOST:
            raise UserError(f"data.source: braces may name {MOST} shards, got {printable(path)}; name a folder of them")
        between.append(path[end : match.start()])
        braces.append([f"{n:0{len(first)}d}" for n in numbers] if words is None else words.split(","))
        end = match.end()
    return ["".join(sum(zip(between, values, strict=True), ())) + path[end:] for values in product(*braces)]
