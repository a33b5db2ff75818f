"""A source whose labels mean what they meant in training: classes are found again by their names, not by position.

Folders that hold some of the classes, or the same ones in another order, are evaluated as they are.
"""

from functools import cached_property
from typing import Any

import numpy as np

from data.sources import Source, Split


class RelabelledSplit:
    """A split with other labels; everything else, such as paths, is that of the split."""

    def __init__(self, split: Split, labels: np.ndarray, count: int) -> None:
        self._split = split
        given = np.asarray(split.labels)
        if given.ndim == 2:  # several of one image
            self.labels = np.zeros((len(given), count), given.dtype)
            self.labels[:, labels] = given
        else:
            self.labels = labels[given]

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Any, int | np.ndarray]:
        image, label = self._split[index][0], self.labels[index]
        return image, int(label) if self.labels.ndim == 1 else label

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_split":  # while a worker unpickles it
            raise AttributeError(name)
        return getattr(self._split, name)


class Relabelled:
    """A source seen with the classes of a trained model, for evaluation.

    Args:
        source: its `classes` must all be among `classes`.
        classes: names by label, as in training.
    """

    def __init__(self, source: Source, classes: list[str]) -> None:
        self.source, self.classes, self.embedded = source, list(classes), source.embedded

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    @cached_property
    def _labels(self) -> np.ndarray:
        places = {name: label for label, name in enumerate(self.classes)}
        return np.array([places[name] for name in self.source.classes], dtype=np.int64)

    @cached_property
    def train(self) -> RelabelledSplit:
        return RelabelledSplit(self.source.train, self._labels, len(self.classes))

    @cached_property
    def val(self) -> RelabelledSplit:
        return RelabelledSplit(self.source.val, self._labels, len(self.classes))
