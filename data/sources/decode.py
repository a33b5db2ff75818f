"""One way to turn a file into an RGB image, for all sources.

Any mode becomes 8-bit RGB: grey is repeated, palettes are looked up, alpha is dropped (the colour under it stays),
CMYK is converted, 16-bit grey is scaled to 8 bits (Pillow's own conversion would saturate it). Of an animation the
first frame is taken. The EXIF orientation is ignored, as timm and torchvision do, and with them the published results.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.folders import printable
from data.sources.arrays import read_array
from data.sources.form import RGB, Form, as_image
from data.sources.formats import image_of

MAX_RATIO = 256  # of the sides: resized to a square's height, a thinner picture would fill the memory

MEND = "mend or remove the file, or set data.on_error=skip to leave such images out of training"


Look = Callable[[Image.Image], None]
_look: ContextVar[Look | None] = ContextVar("look", default=None)


@contextmanager
def before_decoding(look: Look | None) -> Iterator[None]:
    """Inside, `look` is called with every RGB image of a file that is open and not decoded; whatever the source."""
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


class UnreadableImage(UserError):
    """A file that is not a readable image; the message names it."""


def read_image(file: str | os.PathLike | bytes, name: str | None = None, form: Form = RGB) -> Image.Image | np.ndarray:
    """Reads and decodes an image: to RGB, or to an array (H, W, channels) of another form.

    Args:
        file: a path, or the encoded bytes.
        name: what to call it in errors; the path by default.
        form: channels and depth of the run.

    Raises:
        UnreadableImage: anything that keeps it from being decoded: missing, no file, truncated, not an image, larger
            than Pillow's limit against decompression bombs (about 179 million pixels), a strip, floating-point pixels.
    """
    name = name or (f"{len(file)} bytes" if isinstance(file, bytes) else os.fspath(file))
    name = printable(name)
    try:
        if not form.plain:
            return read_array(file, form)
        if name.endswith(".npy"):
            return as_image(read_array(file, form))
        with image_of(file) as image:
            if max(image.size) > MAX_RATIO * min(image.size):
                width, height = image.size
                raise ValueError(f"{width} × {height} pixels, one side more than {MAX_RATIO} times the other")
            if (look := _look.get()) is not None:
                look(image)
            return to_rgb(image)
    except Exception as error:  # decoders raise whatever a broken file makes them stumble on
        raise UnreadableImage(
            f"read_image: unreadable image, got {name} ({type(error).__name__}: {error}); {MEND}"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB copy of `image`; see the module for what happens to other modes."""
    if image.mode == "RGB":
        image.load()
        return image.copy() if getattr(image, "is_animated", False) else image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image).convert("RGB")
    if image.mode == "F":
        raise UserError("to_rgb: floating-point pixels have no fixed range, got mode F; save the image with 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"to_rgb: integer pixels outside 16 bits, got {values.min()} to {values.max()}; save the image with 8 bits"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
