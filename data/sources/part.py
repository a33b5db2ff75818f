"""A part of the training images of any source: a share of every class, or so many of each (`data.subset`)."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data.order.stratified import part
from data.sources import Source, Split


class PartSplit:
    """Some images of a split that is in memory or drawn, so that none has a path."""

    def __init__(self, split: Split, chosen: np.ndarray) -> None:
        self._split, self._chosen = split, chosen
        self.labels = split.labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def keys(self) -> np.ndarray:
        """Which images of the split they are (`data.order.fingerprint`)."""
        return self._chosen.astype(np.uint64)

    def sizes(self, places: np.ndarray) -> Sequence[int]:
        """Those of the split, where it has them."""
        return self._split.sizes(self._chosen[places]) if hasattr(self._split, "sizes") else ()

    def contents(self, places: np.ndarray) -> Sequence[int]:
        """Those of the split, where it has them."""
        return self._split.contents(self._chosen[places]) if hasattr(self._split, "contents") else ()

    def __getitem__(self, index: int) -> Any:
        return self._split[int(self._chosen[index])]


class Part:
    """A source of which only a part is trained on; validation is that of the source.

    Args:
        whole: the source.
        subset: `10%`, at least one image of each class, or a number of images per class.
        seed: names what is chosen; a larger part holds a smaller one.
    """

    def __init__(self, whole: Source, subset: str | int, seed: int) -> None:
        self.whole, self.subset, self.seed = whole, subset, seed

    @cached_property
    def train(self) -> Any:
        split = self.whole.train
        labels = split.labels if split.labels.ndim == 1 else split.labels.argmax(1)
        names = split.files.tolist() if hasattr(split, "files") else [str(index) for index in range(len(split))]
        chosen = part(labels, names, self.subset, self.seed)
        return split.take(chosen) if hasattr(split, "take") else PartSplit(split, chosen)

    def notes(self) -> list[str]:
        """What the source says, and how many images are left."""
        each = "of each class" if isinstance(self.subset, str) else "images of each class"
        found = f"data.subset: {self.subset} {each}, {len(self.train)} of {len(self.whole.train)} training images"
        return [*(self.whole.notes() if hasattr(self.whole, "notes") else []), found]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "whole":  # while it is copied
            raise AttributeError(name)
        return getattr(self.whole, name)


def subset_problems(subset: Any) -> list[str]:
    """What is wrong with the setting."""
    share = isinstance(subset, str) and re.fullmatch(r"\d+(\.\d+)?\s*%", subset)
    if share and 0 < float(subset.rstrip("% ")) <= 100:
        return []
    if subset is None or (isinstance(subset, int) and not isinstance(subset, bool) and subset >= 1):
        return []
    return [f"data.subset: got {subset!r}; give a share such as 10%, images per class such as 50, or null for all"]
