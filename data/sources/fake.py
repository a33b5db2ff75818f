"""Noise with labels, for smoke runs and timing: nothing to learn, nothing to read, any size and number of classes."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from data.order.randomness import NOISE, generator
from data.sources.form import LARGEST, Form


class FakeSplit:
    """Image `i` is noise that depends on (seed, split, i) only; its label is `i` modulo the classes."""

    def __init__(self, length: int, num_classes: int, size: tuple[int, int], seed: int, split: int) -> None:
        self.size, self.seed, self.split = size, seed, split
        self.labels = np.arange(length, dtype=np.int64) % num_classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        noise = generator(self.seed, NOISE, self.split, index)
        pixels = noise.integers(0, 256, (*self.size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), int(self.labels[index])

    def read(self, index: int, form: Form) -> np.ndarray:
        """Noise of another form: whole numbers of its depth, or floats with mean 0 and standard deviation 1."""
        noise, shape = generator(self.seed, NOISE, self.split, index), (*self.size, form.channels)
        if form.depth == "float32":
            return noise.standard_normal(shape, dtype=np.float32)
        return noise.integers(0, LARGEST[form.depth] + 1, shape, dtype=form.depth)


class Fake:
    """Deterministic noise.

    Args:
        num_classes: classes; labels go round through them.
        size: of the images in pixels, before the transform: one number or (height, width).
        train_images, val_images: images per split.
        seed: names the noise.
    """

    embedded = True

    def __init__(
        self,
        num_classes: int = 10,
        size: int | Sequence[int] = 32,
        train_images: int = 256,
        val_images: int = 64,
        seed: int = 0,
    ) -> None:
        self.num_classes, self.seed = num_classes, seed
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.train_images, self.val_images = train_images, val_images
        self.classes = [f"class {number}" for number in range(num_classes)]

    @cached_property
    def train(self) -> FakeSplit:
        return FakeSplit(self.train_images, self.num_classes, self.size, self.seed, 0)

    @cached_property
    def val(self) -> FakeSplit:
        return FakeSplit(self.val_images, self.num_classes, self.size, self.seed, 1)
