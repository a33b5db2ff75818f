"""Scanned digits scattered over a canvas, two of them in frames: are these two the same digit?

The frames are far apart, so that the answer needs two distant places at once: a model must read both and compare them;
what one place shows, or all places on average, does not tell. Canvases for validation show scans that no canvas for
training shows.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from conf.values import refuse, whole
from data.order.randomness import NOISE, generator
from data.sources.digits import Digits, DigitsSplit

FAR = 2  # cells between the two frames, in rows or in columns


class DigitsCanvasSplit:
    """Canvas `i` depends on (seed, split, i) only; on every other one the framed digits are the same, label 1."""

    def __init__(self, source: "DigitsCanvas", length: int, scans: DigitsSplit, split: int) -> None:
        self.source, self.scans, self.split = source, scans, split
        self.labels = np.arange(length, dtype=np.int64) % 2
        self.of_digit = [np.flatnonzero(scans.labels == digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        chance, label = generator(self.source.seed, NOISE, self.split, index), int(self.labels[index])
        digits = chance.integers(0, 10, self.source.digits)
        if label:
            digits[1] = digits[0]
        elif digits[0] == digits[1]:
            digits[1] = (digits[0] + chance.integers(1, 10)) % 10
        scans = [self.scans.pixels[chance.choice(self.of_digit[digit])] for digit in digits]
        return self._drawn(scans, self._cells(chance)), label

    def _cells(self, chance: np.random.Generator) -> np.ndarray:
        """A row and a column for each digit (K, 2), those of the first two far apart."""
        side = self.source.cells
        while True:
            chosen = chance.permutation(side * side)[: self.source.digits]
            places_K2 = np.stack([chosen // side, chosen % side], -1)
            if np.abs(places_K2[0] - places_K2[1]).max() >= FAR:
                return places_K2

    def _drawn(self, scans: Sequence[np.ndarray], places_K2: np.ndarray) -> Image.Image:
        """Grey digits on black, the first two in white frames."""
        cell = np.array(self.source.size) / self.source.cells
        image = Image.new("L", self.source.size[::-1])
        pen = ImageDraw.Draw(image)
        for number, (scan, place) in enumerate(zip(scans, places_K2, strict=True)):
            top, left, bottom, right = (int(edge) for edge in (*(place * cell), *((place + 1) * cell - 1)))
            border = max(1, round(min(cell) / 12))
            height, width = bottom - top + 1 - 2 * border, right - left + 1 - 2 * border
            image.paste(Image.fromarray(scan).resize((width, height), Image.BICUBIC), (left + border, top + border))
            if number < 2:
                pen.rectangle((left, top, right, bottom), outline=255, width=border)
        return image.convert("RGB")


class DigitsCanvas:
    """Two classes, as many canvases as asked for.

    Args:
        size: height and width in pixels, or one number for both.
        digits: how many are on a canvas, the two in frames included.
        cells: places for them along a side.
        train_images, val_images: images per split.
        seed: names the canvases.
    """

    embedded = False  # drawn in the workers

    def __init__(
        self,
        size: int | Sequence[int] = 64,
        digits: int = 5,
        cells: int = 4,
        train_images: int = 20_000,
        val_images: int = 2_000,
        seed: int = 0,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.cells = whole("data: digits_canvas", "cells", cells, FAR + 1, fix="set data.source.cells=4")
        whole("data: digits_canvas", "digits", digits, 2, fix="set data.source.digits=5")
        if digits > cells**2:
            refuse("data: digits_canvas", "digits", f"at most {cells**2}", digits, "set data.source.cells to more")
        if min(self.size) < 4 * cells:
            wanted = f"at least {4 * cells} pixels for {cells} digits along a side"
            refuse("data: digits_canvas", "image_size", wanted, size, f"set image_size={16 * cells}")
        self.digits, self.train_images, self.val_images, self.seed = digits, train_images, val_images, seed
        self.classes = ["different", "same"]

    @cached_property
    def _scans(self) -> Digits:
        return Digits()

    @cached_property
    def train(self) -> DigitsCanvasSplit:
        return DigitsCanvasSplit(self, self.train_images, self._scans.train, 0)

    @cached_property
    def val(self) -> DigitsCanvasSplit:
        return DigitsCanvasSplit(self, self.val_images, self._scans.val, 1)
