"""Where images come from: one file per kind of source.

A source is built from configuration alone and reads nothing until a split is asked for, because the model needs the
number of classes before any data exists.
"""

from typing import Protocol

import numpy as np
from PIL import Image


class Split(Protocol):
    """One part of a source, map-style: readable in any order, by any worker."""

    labels: np.ndarray  # int64 (len,), known without decoding an image; bool (len, classes) where there may be several
    # where neighbours are read together: `blocks: np.ndarray`, the images of each shard in order; then only those of a
    # few shards are mixed (`data.order.sampler`)

    # by which a run knows its data again (`data.order.fingerprint`): `files: np.ndarray`, names as bytes, or
    # `keys() -> np.ndarray`, a number per image; and `sizes(places)`, `contents(places) -> Sequence[int]` of some

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An RGB image, or its pixels (H, W, C), and its label. Raises `UnreadableImage`, naming the file.

        A split that can do more has `read(index, form)` too, which gives pixels of other channels and depths
        (`data.sources.form`); of one that has not, these images are converted.
        """
        ...


class Source(Protocol):
    """What `ImageData` reads from. `embedded` sources are small and in memory: workers would only cost time."""

    embedded: bool

    @property
    def train(self) -> Split: ...

    @property
    def val(self) -> Split: ...

    @property
    def classes(self) -> list[str]:
        """Class names; a label is a position in this list."""
        ...
