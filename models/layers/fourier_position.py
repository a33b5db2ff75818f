"""Sines and cosines of the place of every pixel, beside what the pixel holds.

Source: Perceiver, Jaegle et al., ICML 2021, arXiv:2103.03206, section 3.2.
Shapes: B = batch, S = H·W pixels, C = channels, K = bands.
"""

import math

import torch
from torch import Tensor, nn

from models.layers.tokens import to_tokens


class FourierPixels(nn.Module):
    """(B, channels, H, W) → (B, H·W, channels + 2 (2 K + 1)): a pixel, and where it lies along each axis.

    A place is p in [-1, 1] from the first to the last pixel of an axis: sin(π f p) and cos(π f p) for the frequencies
    f, evenly from 1 to half of the largest, and p itself; the rows come first.

    Args:
        in_channels: of the image.
        bands: how many frequencies K.
        max_frequency: pixels along an axis whose places they tell apart; the largest frequency is half of it.
    """

    def __init__(self, in_channels: int, bands: int, max_frequency: float) -> None:
        super().__init__()
        self.bands, self.max_frequency = bands, max_frequency
        self.dim = in_channels + 2 * (2 * bands + 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        rows, columns = (self._waves(side, images.device) for side in (height, width))
        shape = (height, width, rows.shape[-1])
        places_HWF = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=-1)
        places_BSF = places_HWF.flatten(0, 1).to(images.dtype).expand(images.shape[0], -1, -1)
        return torch.cat([to_tokens(images), places_BSF], dim=-1)

    def _waves(self, side: int, device: torch.device) -> Tensor:
        """(side, 2 K + 1) in float32."""
        places = torch.linspace(-1, 1, side, device=device)[:, None]
        angles = places * torch.linspace(1, self.max_frequency / 2, self.bands, device=device) * math.pi
        return torch.cat([angles.sin(), angles.cos(), places], dim=-1)
