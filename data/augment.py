"""What training may change about an image: the plain values of `conf/augment/*.yaml`, checked.

Everything is off by default. The first group acts on single images in the loader's workers (`transforms.py`), the
second on batches where they lie (`device.py`), the third on the order (`sampler.py`).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.errors import UserError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
RANDOM = "random"  # bilinear or bicubic for each image, as timm's settings call it


@dataclass(frozen=True)
class Augment:
    """One augmentation recipe.

    `scale` and `ratio`: area (share of the image) and aspect ratio of a random crop, resized to the image size;
    without `scale` the whole image is resized and its centre taken. `interpolation`: one for all, or `random`, which
    draws bilinear or bicubic for each crop and each turn of RandAugment. `shift`: the largest displacement in each
    direction, as a share of the image size, black outside. `hflip`: probability of a mirror image.
    `rand_augment`: a timm policy, e.g. `rand-m9-mstd0.5-inc1`. `color_jitter`: strength for brightness,
    contrast and saturation; usual policies replace it. `draft`: decode JPEGs no larger than the crop needs; faster
    where the image size is small, and pixels differ a little (`data.draft`).

    `erasing`: probability of erasing a rectangle, filled with noise. `mixup` and `cutmix`: Beta parameters, 0
    switches off; `mix_probability` per batch, `switch_probability` of cutmix when both are on. Mixed targets are
    soft but not smoothed: smoothing belongs to the loss. `erase_mixed`: erase after mixing, as timm's loader does,
    instead of before.

    `repeated`: appearances of an image in a row (repeated augmentation); 1 is ordinary training.
    """

    interpolation: str = "bicubic"
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    shift: float = 0.0
    hflip: float = 0.0
    rand_augment: str | None = None
    color_jitter: float = 0.0
    draft: bool = False

    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    switch_probability: float = 0.5
    erase_mixed: bool = False

    repeated: int = 1

    @classmethod
    def build(cls, values: Mapping[str, Any] | None) -> "Augment":
        """From a mapping of plain values.

        Raises:
            ValueError: all unknown keys, wrong types and values out of range, in one message.
        """
        return checked(cls, "augment", "conf/augment/*.yaml", plain(values or {}))

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, so that targets are soft."""
        return self.mixup > 0 or self.cutmix > 0

    def problems(self) -> list[str]:
        """What is wrong with the values, one entry each."""
        found = []
        for name in ("hflip", "erasing", "mix_probability", "switch_probability"):
            if not _number(getattr(self, name), 0, 1):
                found.append(f"{name}={getattr(self, name)!r}, expected a probability between 0 and 1")
        for name, high in (("shift", 0.5), ("color_jitter", 1), ("mixup", 100), ("cutmix", 100)):
            if not _number(getattr(self, name), 0, high):
                found.append(f"{name}={getattr(self, name)!r}, expected a number between 0 and {high}")
        if self.scale is not None and not _interval(self.scale, 1):
            found.append(f"scale={self.scale!r}, expected two areas such as [0.08, 1], at most 1")
        if not _interval(self.ratio, 100):
            found.append(f"ratio={self.ratio!r}, expected two aspect ratios such as [0.75, 1.33]")
        if self.interpolation not in (known := (*INTERPOLATIONS, RANDOM)):
            found.append(f"interpolation={self.interpolation!r}, expected one of {', '.join(known)}")
        elif self.interpolation == RANDOM and (self.scale is None or self.draft is True):
            found.append("interpolation='random', expected one for all where scale is null or draft is true")
        if not isinstance(self.repeated, int) or isinstance(self.repeated, bool) or self.repeated < 1:
            found.append(f"repeated={self.repeated!r}, expected a whole number from 1")
        for name in ("erase_mixed", "draft"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name}={getattr(self, name)!r}, expected true or false")
        if self.rand_augment is not None and not str(self.rand_augment).startswith("rand-"):
            found.append(f"rand_augment={self.rand_augment!r}, expected a policy such as rand-m9-mstd0.5-inc1")
        return found


def checked(kind: type, who: str, where: str, values: Mapping[str, Any]) -> Any:
    """`kind(**values)` when the keys exist and its `problems()` are none; else one error that lists them all."""
    known = [field.name for field in dataclasses.fields(kind)]
    problems = [f"unknown key {key}, known are {', '.join(known)}" for key in values if key not in known]
    built = kind(**{key: value for key, value in values.items() if key in known})
    problems += built.problems()
    if problems:
        raise UserError(f"{who}: wrong configuration, got {'; '.join(problems)}; see {where}")
    return built


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples for lists, OmegaConf's included, which are sequences but not lists."""
    return {key: tuple(v) if hasattr(v, "__iter__") and not isinstance(v, str) else v for key, v in values.items()}


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _interval(value: Any, high: float) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return all(_number(v, 0, high) for v in value) and 0 < value[0] <= value[1]
