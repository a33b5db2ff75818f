"""A foveated view of images: rows are distances from a place, which grow geometrically, and columns are directions.

Row i of R and column j of A show the place at distance r₀ (1 / r₀)^(i / (R − 1)), in halves of the shorter side, and at
the angle 2π j / A around the fixation; bilinear, and 0, the mean of normalised images, outside. A rotation of the image
by 90° around a fixation in its middle moves the view by A / 4 columns, and a change of size moves it by rows.

Source: Foveated Retinotopy Improves Classification and Localization in Convolutional Neural Networks, Jérémie et al.,
2024, arXiv:2402.15480; the map is the usual one, not compared with the authors' code.
Shapes: B = batch, C = channels, H W = pixels, R = radii, A = angles.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import UserError
from conf.values import is_number, is_whole
from data.augment import checked, plain

NAME = "logpolar"


@dataclass(frozen=True)
class LogPolar:
    """Called as `view(images)`: (B, C, H, W) → (B, C, R, A + 2 · wrap), float, on the device of the images.

    `radii`, `angles`: R and A; as many as rows and columns of the image when `None`. `fixation`: its place, as shares
    from the left and from the top. `smallest`: r₀. `wrap`: columns of the other side that are repeated at each side, so
    that convolutions see directions as the circle that they are.
    """

    radii: int | None = None
    angles: int | None = None
    fixation: tuple[float, float] = (0.5, 0.5)
    smallest: float = 0.05
    wrap: int = 0

    @classmethod
    def build(cls, setting: Any) -> "LogPolar | None":
        """What `data.view` asks for: `logpolar`, a mapping with that name and options, or None for none.

        Raises:
            ValueError: another name, or all unknown keys and values out of range, in one message.
        """
        if setting is None:
            return None
        options = plain(setting) if isinstance(setting, Mapping) else {"name": setting}
        if (name := options.pop("name", None)) != NAME:
            raise UserError(
                f"data.view: must be {NAME}, or a mapping with name: {NAME} and its options, got {name!r}; "
                f"set data.view={NAME} or null"
            )
        return checked(cls, "data.view", "data/view.py", options)

    def problems(self) -> list[str]:
        """What is wrong with the values, one entry each."""
        found = []
        for name in ("radii", "angles"):
            if (value := getattr(self, name)) is not None and not is_whole(value, 2):
                found.append(f"{name}={value!r}, expected a whole number from 2 or null")
        place = self.fixation
        if not (isinstance(place, tuple) and len(place) == 2 and all(is_number(v, 0, 1) for v in place)):
            found.append(f"fixation={place!r}, expected shares from the left and from the top, such as [0.5, 0.5]")
        if not is_number(self.smallest, 0, 1) or self.smallest in (0, 1):
            found.append(f"smallest={self.smallest!r}, expected a distance between 0 and 1")
        if not is_whole(self.wrap, 0) or (self.angles is not None and self.wrap > self.angles):
            found.append(f"wrap={self.wrap!r}, expected a whole number from 0, at most as many as angles")
        return found

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the view of an image."""
        return self.radii or height, (self.angles or width) + 2 * self.wrap

    def __call__(self, images: Tensor) -> Tensor:
        places_RA2 = self.places(*images.shape[2:], device=images.device)
        viewed = F.grid_sample(images, places_RA2.expand(images.shape[0], -1, -1, -1), align_corners=False)
        return viewed.contiguous(memory_format=torch.channels_last)

    def places(self, height: int, width: int, device: Any = None) -> Tensor:
        """(R, A + 2 · wrap, 2): across and down, −1 … 1 from edge to edge."""
        rows, columns = self.sides(height, width)
        share_R = torch.arange(rows, dtype=torch.float64) / max(rows - 1, 1)
        distance_R = min(height, width) / 2 * self.smallest ** (1 - share_R)
        column_A = torch.arange(-self.wrap, columns - self.wrap, dtype=torch.float64)
        angle_A = 2 * math.pi * column_A / (columns - 2 * self.wrap)
        steps = torch.stack([angle_A.cos(), angle_A.sin()], dim=-1) * distance_R[:, None, None]
        pixels = torch.tensor([width, height], dtype=torch.float64)
        return (2 * torch.tensor(self.fixation, dtype=torch.float64) - 1 + 2 * steps / pixels).float().to(device)


def seen(view: LogPolar | None, crop: int | Sequence[int]) -> int | tuple[int, int]:
    """The size of what a model sees of a crop: one number, or height and width."""
    if view is None:
        return crop
    return view.sides(*((crop, crop) if isinstance(crop, int) else crop))
