"""What the pixels of a run are: how many channels, and of which kind of number.

8-bit RGB, the form of all published results, goes through Pillow from the file to the batch; every other form is an
array from the file on, resized in float32 and rounded back at the end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conf.errors import UserError

LARGEST = {"uint8": 255, "uint16": 65535, "float32": 1}  # what mean and std are divided by: floats are as they are
MAX_CHANNELS = 16
LUMINANCE = (19595, 38470, 7471)  # of red, green and blue in 65536 parts, as Pillow's grey


class Form(NamedTuple):
    """Channels of an image, and `uint8`, `uint16` or `float32`."""

    channels: int = 3
    depth: str = "uint8"

    @property
    def plain(self) -> bool:
        """Whether it is 8-bit RGB."""
        return self == RGB

    def __str__(self) -> str:
        return f"{self.channels} channel(s) of {self.depth}"


RGB = Form()


def per_channel(values: Any, form: Form) -> Any:
    """mean or std as a tuple; three equal numbers stand for any number of channels."""
    if not isinstance(values, Sequence) and not hasattr(values, "__iter__"):
        return values
    values = tuple(values)
    if len(values) == 3 and len(set(values)) == 1 and isinstance(form.channels, int):
        return values[:1] * form.channels
    return values


def fitted(pixels: Any, form: Form) -> np.ndarray:
    """An image or an array (H, W) or (H, W, C) of a source in this form, as (H, W, channels).

    Grey is repeated for RGB, RGB becomes its luminance for one channel; any other number of bands must be that of the
    form. 8 bits are stretched to 16 and 16 rounded to 8; `float32` takes the numbers as they are.

    Raises:
        ValueError: other bands, or numbers that the depth cannot hold.
    """
    array = np.asarray(pixels)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "buif":
        raise UserError(f"pixels must be numbers (H, W) or (H, W, C), got {array.dtype} {array.shape}")
    return _of_depth(_of_channels(_known(array), form.channels), form.depth)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, C) as float32 (C, H, W), which all resizing works on."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32))


def from_float(pixels: Tensor, form: Form) -> Tensor:
    """Back to the numbers of the form: rounded and kept in their range."""
    if form.depth == "float32":
        return pixels
    return pixels.round().clamp(0, LARGEST[form.depth]).to(getattr(torch, form.depth))


def _known(array: np.ndarray) -> np.ndarray:
    """As uint8, uint16, int64 or float32."""
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    fits = array.min() >= 0 and array.max() <= LARGEST["uint16"]
    return array.astype(np.uint16 if fits else np.int64)


def _of_channels(array: np.ndarray, channels: int) -> np.ndarray:
    bands = array.shape[2]
    if bands == channels:
        return array
    if bands == 1 and channels == 3:
        return array.repeat(3, axis=2)
    if bands == 3 and channels == 1:
        if array.dtype.kind == "f":
            return array @ (np.array(LUMINANCE, np.float32) / 65536)[:, None]
        grey = (array.astype(np.int64) @ np.array(LUMINANCE)[:, None] + 32768) >> 16
        return grey.astype(array.dtype)
    raise UserError(f"{bands} channel(s), but data.channels={channels}")


def _of_depth(array: np.ndarray, depth: str) -> np.ndarray:
    if depth == "float32":
        if not np.isfinite(array).all():
            raise UserError("values that are not finite")
        return array.astype(np.float32)
    if array.dtype not in (np.uint8, np.uint16):
        kind = "floating-point values have no fixed range" if array.dtype.kind == "f" else "values outside 16 bits"
        raise UserError(f"{kind}, but data.depth={depth}; set data.depth=float32")
    if array.dtype == depth:
        return array
    if depth == "uint16":
        return array.astype(np.uint16) * 257
    return ((array.astype(np.int64) + 128) // 257).astype(np.uint8)


def as_image(pixels: Any) -> Image.Image:
    """What a source gives for 8-bit RGB: an image as it is, an array as an image."""
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(fitted(pixels, RGB))
