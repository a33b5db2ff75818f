"""Images without labels, of any paths, to be predicted: one that cannot be read is marked and stops nothing."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.sources.decode import UnreadableImage, read_image
from data.sources.form import Form

SIDE = 8  # pixels of what stands for an image that cannot be read


class PictureSplit:
    """The images at these paths; in the place of one that cannot be read there is a black one.

    `unreadable` (len,), uint8, says which: 1 once that has been found out, by any worker of this process.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self.labels = np.zeros(len(self.files), np.int64)
        self.unreadable: Tensor = torch.zeros(len(self.files), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def relative_path(self, index: int) -> str:
        return self.files[index]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return read_image(self.files[index]), 0
        except UnreadableImage:
            self.unreadable[index] = 1
            return Image.new("RGB", (SIDE, SIDE)), 0

    def read(self, index: int, form: Form) -> np.ndarray:
        """An image in another form than 8-bit RGB."""
        try:
            return read_image(self.files[index], form=form)
        except UnreadableImage:
            self.unreadable[index] = 1
            return np.zeros((SIDE, SIDE, form.channels), form.depth)

    def trouble(self, index: int, form: Form) -> str:
        """Why an image cannot be read."""
        try:
            read_image(self.files[index], form=form)
        except UnreadableImage as error:
            return str(error).partition(" (")[2].rpartition("); ")[0] or str(error)
        return "it could not be read before, and can be now"


class Pictures:
    """A source of them, seen with the classes of a trained model; there is nothing to train on.

    Args:
        files: their paths.
        classes: names by label.
    """

    embedded = False

    def __init__(self, files: Sequence[str], classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.train = self.val = PictureSplit(files)
