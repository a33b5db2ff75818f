"""Image files, opened by a list of formats: what the bytes say decides, and none of these starts another program.

Pillow's own list is longer: it hands PostScript in a `.jpg` to Ghostscript.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from PIL import Image

from conf.files import opened

# of `conf.folders.EXTENSIONS`, by Pillow's names
FORMATS = (
    *("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000"),
    *("TGA", "QOI", "PCX", "PSD", "SGI", "DDS", "ICO", "ICNS"),
)


@contextmanager
def image_of(file: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    """The image in an ordinary file, or in its bytes, not yet decoded.

    Raises:
        OSError: it is none of these formats, or no ordinary file.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else opened(file)
    with stream, Image.open(stream, formats=_known()) as image:
        yield image


@cache
def _known() -> tuple[str, ...]:
    """Those that this Pillow has, in the order in which it tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name in FORMATS)
