"""scikit-learn's handwritten digits: 1,797 real 8 × 8 grey images in 10 classes, embedded in the package.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
The split is fixed: 1,437 for training and 360 for validation, the same share of every class in both.
"""

from functools import cached_property

import numpy as np

from data.sources.array_split import ArraySplit

VALIDATION = 360  # images, one fifth


class DigitsSplit(ArraySplit):
    """8 × 8 images, kept as uint8 (n, 8, 8); the transform scales them to the image size."""


class Digits:
    """The embedded data set; scikit-learn is imported when it is first read."""

    embedded = True

    def __init__(self) -> None:
        self.classes = [str(digit) for digit in range(10)]

    @cached_property
    def _splits(self) -> tuple[DigitsSplit, DigitsSplit]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the file counts from 0 to 16
        labels = digits.target.astype(np.int64)
        parts = train_test_split(pixels, labels, test_size=VALIDATION, stratify=labels, random_state=0)
        return DigitsSplit(parts[0], parts[2]), DigitsSplit(parts[1], parts[3])

    @property
    def train(self) -> DigitsSplit:
        return self._splits[0]

    @property
    def val(self) -> DigitsSplit:
        return self._splits[1]
