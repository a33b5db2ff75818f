"""From a PIL image to a uint8 tensor (3, H, W), on the CPU: the training and the evaluation transform.

torchvision's functions act on PIL images here, so results equal those of the usual PIL pipelines. Pixels of another
form (`data.sources.form`) are float32 tensors meanwhile. RandAugment is timm's. Randomness comes from the global
generators, which `dataset.py` seeds for each sample.
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import timm.data.auto_augment as timm_augment
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from conf.values import is_whole
from data.augment import INTERPOLATIONS, RANDOM, Augment, checked, plain
from data.draft import DraftCover, DraftCrop
from data.sources.decode import Look
from data.sources.form import RGB, Form, from_float, to_tensor

FILTERS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)  # of which `random` draws


@dataclass(frozen=True)
class Evaluation:
    """How an image is prepared for evaluation.

    `size`: pixels, one number or (height, width); the training size when `None`. `resize`: the shorter side before
    the centre crop, in pixels; `size / crop_fraction`, rounded down, when `None`. For a size that is not square the
    image is made just large enough to cover a rectangle of that shape whose shorter side `resize` is. `squash`: the
    image becomes that rectangle, whatever its aspect ratio. `crop_fraction`: when `None` 0.875, and 1 (the whole
    image) when squashed.
    """

    size: int | tuple[int, int] | None = None
    resize: int | None = None
    crop_fraction: float | None = None
    interpolation: str = "bicubic"
    squash: bool = False

    @classmethod
    def build(cls, values: Mapping[str, Any] | None) -> "Evaluation":
        """From a mapping of plain values.

        Raises:
            ValueError: all unknown keys, wrong types and values out of range, in one message.
        """
        return checked(cls, "eval", "conf/data/*.yaml", plain(values or {}))

    def problems(self) -> list[str]:
        """What is wrong with the values, one entry each."""
        found = []
        if self.size is not None and not is_size(self.size):
            found.append(f"eval.size={self.size!r}, expected pixels (a whole number from 1, or two) or null")
        if self.resize is not None and not is_whole(self.resize):
            found.append(f"eval.resize={self.resize!r}, expected pixels (a whole number from 1) or null")
        fraction = self.crop_fraction
        if fraction is not None and (not isinstance(fraction, int | float) or not 0 < fraction <= 1):
            found.append(f"eval.crop_fraction={self.crop_fraction!r}, expected a share above 0 and at most 1")
        if self.interpolation not in INTERPOLATIONS:
            found.append(f"eval.interpolation={self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
        if not isinstance(self.squash, bool):
            found.append(f"eval.squash={self.squash!r}, expected true or false")
        return found

    def sides(self, image_size: int | Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of what the model sees, and of what it is cut from."""
        size = sides(self.size or image_size)
        if self.resize is not None:
            shorter = min(size)
            return size, tuple(round(self.resize * side / shorter) for side in size)
        # Rounded down as in the evaluation code of the papers (DeiT, Swin, timm); the small term is for 0.9 and kin.
        fraction = self.crop_fraction or (1.0 if self.squash else 0.875)
        return size, tuple(int(side / fraction + 1e-6) for side in size)


class EvaluationTransform:
    """Resizes the image until it covers a rectangle, or squashes it into that, and takes the centre."""

    def __init__(self, evaluation: Evaluation, image_size: int | Sequence[int], form: Form = RGB) -> None:
        self.form = form
        self.size, whole = evaluation.sides(image_size)
        self.mode = InterpolationMode(evaluation.interpolation)
        self.squash = evaluation.squash
        self.target = [whole[0]] if whole[0] == whole[1] and not evaluation.squash else list(whole)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        image = opened(image, self.form)
        image = F.resize(image, self.target, self.mode) if self.squash else cover(image, self.target, self.mode)
        if F.get_size(image) != list(self.size):
            image = F.center_crop(image, list(self.size))
        return closed(image, self.form)


class View(NamedTuple):
    """What a training image shows of the original: a box, mirrored or not.

    `box`: left, top, right and bottom as shares of the original's width and height.
    """

    box: tuple[float, float, float, float]
    mirrored: bool


class DrawnCrop(v2.RandomResizedCrop):
    """That crop, with a filter that is drawn for each image."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        mode = random.choice(FILTERS)
        return F.resized_crop(inpt, **params, size=self.size, interpolation=mode, antialias=self.antialias)


class TrainTransform:
    """Crop or resize, shift, mirror, jitter, RandAugment: those that are on, in this order."""

    def __init__(
        self, augment: Augment, image_size: int | Sequence[int], mean: Sequence[float], form: Form = RGB
    ) -> None:
        size, drawn = sides(image_size), augment.interpolation == RANDOM
        mode = FILTERS[0] if drawn else InterpolationMode(augment.interpolation)
        self.size, self.form = size, form
        steps: list[Callable[[Image.Image], Image.Image]] = []
        self.look: Look | None = None  # at an image before it is decoded (`data.sources.decode.before_decoding`)
        if augment.scale is not None:
            crop = (DrawnCrop if drawn else v2.RandomResizedCrop)(size, augment.scale, augment.ratio, mode)
            steps.append(DraftCrop(crop) if augment.draft else crop)
        else:
            steps.append(functools.partial(resize_and_crop, size=size, mode=mode))
        if augment.draft:
            self.look = (steps[0] if augment.scale is not None else DraftCover(size)).look
        if augment.shift > 0:
            steps.append(functools.partial(shift, pixels=tuple(round(augment.shift * side) for side in size)))
        if augment.hflip > 0:
            steps.append(v2.RandomHorizontalFlip(augment.hflip))
        if augment.color_jitter > 0:
            steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
        if augment.rand_augment is not None:
            steps.append(rand_augment(augment.rand_augment, min(size), mean, augment.interpolation))
        self.steps = steps

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        image = opened(image, self.form)
        for step in self.steps:
            image = step(image)
        return closed(image, self.form)

    def with_view(self, image: Image.Image) -> tuple[Tensor, View]:
        """The same image from the same draws, and what it shows, as far as crop and mirror decide it."""
        box, mirrored = centre_box(*image.size, *self.size), False
        for step in self.steps:
            if isinstance(step, v2.RandomResizedCrop):
                (width, height), params = image.size, step.make_params([image])
                left, top = params["left"], params["top"]
                right, bottom = left + params["width"], top + params["height"]
                box = (left / width, top / height, right / width, bottom / height)
                image = step.transform(image, params)
            elif isinstance(step, v2.RandomHorizontalFlip):
                before, image = image, step(image)
                mirrored = image is not before  # the step gives back the very image that it does not mirror
            else:
                image = step(image)
        return F.pil_to_tensor(image), View(box, mirrored)


def centre_box(width: int, height: int, rows: int, columns: int) -> tuple[float, float, float, float]:
    """The box that `resize_and_crop` shows, but for its rounding to whole pixels."""
    shown = min(width, height * columns / rows), min(height, width * rows / columns)
    left, top = (max(0, 1 - part / side) / 2 for part, side in zip(shown, (width, height), strict=True))
    return left, top, 1 - left, 1 - top


def opened(image: Image.Image | np.ndarray, form: Form) -> Image.Image | Tensor:
    """What the steps work on: an image, or float32 (channels, H, W)."""
    return image if form.plain else to_tensor(image)


def closed(image: Image.Image | Tensor, form: Form) -> Tensor:
    """What leaves the loader: uint8 (3, H, W), or the numbers of the form."""
    return F.pil_to_tensor(image) if form.plain else from_float(image, form)


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def is_size(value: Any) -> bool:
    """Whether it is pixels: a whole number from 1, or height and width."""
    return is_whole(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(is_whole, value)))


def cover(image: Image.Image, target: Sequence[int], mode: InterpolationMode) -> Image.Image:
    """As small as covers the target: the shorter side of a square, or (height, width)."""
    if len(target) == 1:
        return F.resize(image, list(target), mode)
    height, width = F.get_size(image)
    scale = max(target[0] / height, target[1] / width)
    size = [max(side, round(scale * own)) for side, own in zip(target, (height, width), strict=True)]
    return F.resize(image, size, mode)


def resize_and_crop(image: Image.Image, size: tuple[int, int], mode: InterpolationMode) -> Image.Image:
    """As small as covers (height, width), then its centre."""
    image = cover(image, size[:1] if size[0] == size[1] else size, mode)
    return image if F.get_size(image) == list(size) else F.center_crop(image, list(size))


def shift(image: Image.Image, pixels: int | tuple[int, int]) -> Image.Image:
    """Moves the image by up to `pixels` (down, across) in each direction, black where nothing was."""
    down, across = sides(pixels)
    left, top = random.randint(0, 2 * across), random.randint(0, 2 * down)
    if isinstance(image, Tensor):
        return F.crop(F.pad(image, [across, down]), top, left, *image.shape[-2:])
    width, height = image.size
    return ImageOps.expand(image, (across, down)).crop((left, top, left + width, top + height))


def rand_augment(policy: str, image_size: int, mean: Sequence[float], interpolation: str) -> Callable:
    """timm's RandAugment with the constants of its ImageNet training: translation and the fill colour.

    Its increasing posterize can ask for 0 bits, a black image in old Pillow and an error from Pillow 13 on: here at
    least one bit is kept.
    """
    constants: dict[str, Any] = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
    }
    if interpolation != RANDOM:  # which timm draws where nothing is said
        constants["interpolation"] = Image.Resampling[interpolation.upper()]
    transform = timm_augment.rand_augment_transform(policy, dict(constants))
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = functools.partial(_at_least_one_bit, op.level_fn)
    return transform


def _at_least_one_bit(bits_for: Callable, level: float, constants: Mapping[str, Any]) -> tuple[int]:
    (bits,) = bits_for(level, constants)
    return (max(1, bits),)
