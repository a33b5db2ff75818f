"""Images without labels, of any paths, to be predicted: one that cannot be read is marked and stops nothing."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.sources.decode import UnreadableImage, read_image

UNREADABLE = -1  # its label; the others have 0
BLANK = (8, 8)


class PictureSplit:
    """The images at these paths; in the place of one that cannot be read there is a black one."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self.labels = np.zeros(len(self.files), np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def relative_path(self, index: int) -> str:
        return self.files[index]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return read_image(self.files[index]), 0
        except UnreadableImage:
            return Image.new("RGB", BLANK), UNREADABLE

    def trouble(self, index: int) -> str:
        """Why an image cannot be read."""
        try:
            read_image(self.files[index])
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
