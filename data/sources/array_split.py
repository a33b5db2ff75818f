"""Images in memory, as one part of a source."""

import zlib

import numpy as np
from PIL import Image


class ArraySplit:
    """Images in memory, uint8 (n, height, width) or (n, height, width, 3)."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def contents(self, places: np.ndarray) -> list[int]:
        """Numbers for what some images hold (`data.order.fingerprint`)."""
        return [zlib.crc32(self.pixels[place].tobytes()) for place in places.tolist()]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])
