"""The three main directions of the tokens of a map as red, green and blue.

Shapes: B = images, C = channels, H W = map.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.probes.drawing.overlays import enlarged

EDGE = 0.01  # of the tokens on either side whose colour is cut off
PICTURE = 0.25  # of the brightness that the picture gives


class Components(NamedTuple):
    """Coordinates of all tokens along the main directions (B, H, W, 3), and the share of the variance of each."""

    coordinates: Tensor
    shares: list[float]


def components(map_BCHW: Tensor) -> Components:
    """Of the tokens of all images together, so that one colour means the same in all of them.

    The sign of a direction makes the coordinate that is farthest from the mean positive.
    """
    x = map_BCHW.detach().permute(0, 2, 3, 1).cpu().double()
    tokens = x.flatten(0, 2)
    tokens = tokens - tokens.mean(0)
    found, sizes, _ = torch.linalg.svd(tokens, full_matrices=False)
    coordinates = torch.zeros(len(tokens), 3, dtype=torch.float64)
    kept = min(3, len(sizes))
    coordinates[:, :kept] = found[:, :kept] * sizes[:kept]
    farthest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
    variance = sizes.square() / sizes.square().sum().clamp_min(1e-300)
    coordinates *= torch.where(farthest < 0, -1.0, 1.0)
    return Components(coordinates.view(*x.shape[:3], 3), [*variance[:3].tolist(), 0.0, 0.0][:3])


def colours(coordinates: Tensor) -> Tensor:
    """From 0 to 1: each coordinate from nearly its least to nearly its largest value over all images."""
    flat = coordinates.flatten(0, -2)
    low, high = flat.quantile(EDGE, dim=0), flat.quantile(1 - EDGE, dim=0)
    return ((coordinates - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def painted(picture: Image.Image, colours_HW3: Tensor) -> Image.Image:
    """A picture, at least 224 pixels large, in the colours of its tokens."""
    base = enlarged(picture)
    cells = Image.fromarray((colours_HW3.numpy() * 255).round().astype(np.uint8))
    tint = np.asarray(cells.resize(base.size, Image.Resampling.NEAREST), np.float32)
    grey = np.asarray(base.convert("L"), np.float32)[..., None]
    return Image.fromarray(((1 - PICTURE) * tint + PICTURE * grey).round().astype(np.uint8))
