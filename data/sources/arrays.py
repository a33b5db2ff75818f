"""Files as arrays: what Pillow reads, and what it does not: 16-bit colour, many bands, `.npy`.

| file | pixels |
|---|---|
| `.npy` | (H, W) or (H, W, C), any numbers; nothing in it is executed |
| PNG of 16-bit colour | all bits |
| TIFF of many bands or of deep colour | strips, uncompressed or deflate; a page per band |
| all others | Pillow: alpha is dropped unless four channels are wanted, palettes are looked up |
"""

import io
import math
import os
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image, TiffImagePlugin

from conf.errors import UserError
from conf.files import contents
from data.sources.form import Form, fitted
from data.sources.formats import image_of

# tags of TIFF
WIDTH, HEIGHT, BITS, COMPRESSION, OFFSETS, SAMPLES, COUNTS, PLANAR, PREDICTOR, FORMAT = (
    *(256, 257, 258, 259, 273, 277, 279, 284, 317, 339),
)
TIFF = (b"II*\0", b"MM\0*")
MAX_BYTES = 2**31  # of a file, and of what is unpacked from it
KINDS = {1: "u", 2: "i", 3: "f"}  # of the tag SampleFormat


def read_array(file: str | os.PathLike | bytes, form: Form) -> np.ndarray:
    """The pixels (H, W, channels) of a file in this form.

    Raises:
        ValueError, OSError: it cannot be read, or has other bands or numbers.
    """
    content = file if isinstance(file, bytes) else contents(file, MAX_BYTES)
    return fitted(_pixels(content, form), form)


def _pixels(content: bytes, form: Form) -> np.ndarray:
    if content.startswith(b"\x93NUMPY"):
        return _of_numpy(content)
    if content.startswith(b"\x89PNG") and content[24] == 16 and content[25] in (2, 4, 6):
        return _without_alpha(_of_deep_png(content), form)
    if content.startswith(TIFF) and (pixels := _of_tiff(content)) is not None:
        return pixels
    with image_of(content) as image:
        if getattr(image, "n_frames", 1) == form.channels > 1 and len(image.getbands()) == 1:
            frames = []
            for number in range(form.channels):
                image.seek(number)
                frames.append(np.asarray(image))
            return np.stack(frames, -1)
        return _of_image(image, form)


def _of_numpy(content: bytes) -> np.ndarray:
    """What is claimed is compared with what there is, before memory is set aside for it."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(stream)
    if not kind.hasobject and math.prod(shape) * max(kind.itemsize, 1) != len(content) - stream.tell():
        raise UserError(f"an array of {shape} {kind} in {len(content)} bytes; save it again")
    return np.load(io.BytesIO(content), allow_pickle=False)


def _of_image(image: Image.Image, form: Form) -> np.ndarray:
    if image.mode in ("L", "RGB", "I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode in ("RGBA", "LA"):
        return _without_alpha(np.asarray(image), form)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


def _of_deep_png(content: bytes) -> np.ndarray:
    """Colour of 16 bits, of which Pillow keeps one byte: the high ones are asked for, then the low ones."""
    halves = []
    for order in "BL":
        with image_of(content) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise UserError("grey of 16 bits with alpha; save it without alpha")
            (tile,) = image.tile
            image.tile = [tile._replace(args=f"{image.mode};16{order}")]
            halves.append(np.asarray(image).astype(np.uint16))
    return halves[0] * 256 + halves[1]


def _without_alpha(pixels: np.ndarray, form: Form) -> np.ndarray:
    bands = pixels.shape[2]
    return pixels[..., : bands - 1] if bands in (2, 4) and bands != form.channels else pixels


def _of_tiff(content: bytes) -> np.ndarray | None:
    """The first page where Pillow cannot read it in full: more than four bands, or colour of more than 8 bits."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
    stream = io.BytesIO(content)
    stream.seek(tags.next)
    tags.load(stream)
    bands, bits = tags.get(SAMPLES, 1), tags.get(BITS, (1,))
    if bands == 1 or (bands <= 4 and max(bits) <= 8):
        return None
    compression = tags.get(COMPRESSION, 1)
    if OFFSETS not in tags or compression not in (1, 8, 32946) or tags.get(PREDICTOR, 1) != 1 or len(set(bits)) > 1:
        raise UserError(
            f"TIFF of {bands} bands in tiles, with compression {compression} or a predictor; save it as strips without "
            "compression, or as .npy"
        )
    height, width = tags[HEIGHT], tags[WIDTH]
    strips = (content[start : start + size] for start, size in zip(tags[OFFSETS], tags[COUNTS], strict=True))
    joined = _joined(strips, compression != 1, height * width * bands * bits[0] // 8)
    order, kind = ">" if content.startswith(b"MM") else "<", KINDS[tags.get(FORMAT, (1,))[0]]
    numbers = np.frombuffer(joined, np.dtype(f"{order}{kind}{bits[0] // 8}"))
    if tags.get(PLANAR, 1) == 2:
        return numbers.reshape(bands, height, width).transpose(1, 2, 0)
    return numbers.reshape(height, width, bands)


def _joined(strips: Iterable[bytes], packed: bool, size: int) -> bytes:
    """The strips of a page of this many bytes; no more is unpacked than it has."""
    if size > MAX_BYTES:
        raise UserError(f"TIFF of {size} bytes, more than {MAX_BYTES}; cut it into parts")
    joined = bytearray()
    for strip in strips:
        joined += zlib.decompressobj().decompress(strip, size + 1 - len(joined)) if packed else strip
        if len(joined) > size:
            raise UserError(f"TIFF whose strips hold more than the {size} bytes of its pixels; save it again")
    return bytes(joined)
