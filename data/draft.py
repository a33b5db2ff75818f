"""JPEGs decoded at a half, a quarter or an eighth of their sides, where no more is needed for what is cut from them.

Pillow's draft mode lets the decoder leave out the high frequencies of its blocks. The box of the crop is drawn first,
from the size in the file's header, with the same random numbers as without; pixels differ a little, so it is an option
of training (`augment.draft`), and evaluation never does it.
"""

from collections.abc import Sequence
from math import ceil

from PIL import Image
from torchvision.transforms import v2


class DraftCrop:
    """`v2.RandomResizedCrop` whose box is drawn by `look`, before the image is decoded.

    Where the file cannot be decoded smaller, or is not small enough for that, it is that crop, bit for bit.
    """

    def __init__(self, crop: v2.RandomResizedCrop) -> None:
        self.crop, self._drawn = crop, None
        self._filter = Image.Resampling[crop.interpolation.name]

    def look(self, image: Image.Image) -> None:
        """Draws the box on an image that is not decoded yet, and asks for no more than its pixels."""
        box, (width, height), (rows, columns) = self.crop.make_params([image]), image.size, self.crop.size
        self._drawn = image.size, box
        image.draft(None, (ceil(width * columns / box["width"]), ceil(height * rows / box["height"])))

    def __call__(self, image: Image.Image) -> Image.Image:
        drawn, self._drawn = self._drawn, None
        if drawn is None:  # no file
            return self.crop(image)
        (width, height), box = drawn
        if image.size == (width, height):
            return self.crop.transform(image, box)
        across, down = image.width / width, image.height / height
        left, top = box["left"] * across, box["top"] * down
        right, bottom = left + box["width"] * across, top + box["height"] * down
        edges = left, top, min(right, image.width), min(bottom, image.height)
        return image.resize(self.crop.size[::-1], self._filter, edges)


class DraftCover:
    """Asks for no more pixels than it takes to cover (height, width)."""

    def __init__(self, size: Sequence[int]) -> None:
        self.size = size

    def look(self, image: Image.Image) -> None:
        """See `DraftCrop`."""
        scale = max(self.size[0] / image.height, self.size[1] / image.width)
        image.draft(None, (ceil(scale * image.width), ceil(scale * image.height)))
