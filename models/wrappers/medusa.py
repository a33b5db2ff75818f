"""A reading of MEDUSA: one encoder-decoder looks at the image, and what it makes gates every stage of a model.

Source: MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image Analysis,
Aboutalebi et al., Frontiers in Medicine 2022, arXiv:2110.06063: "single body, multi-scale heads". There is no code at
hand; the body here is strided convolutions and as many that enlarge, with sums between equal sizes, the smallest map
with its mean added, so that the body sees all of the image. It gives one map A of half the sides of the image; with
this pooled to the map of stage s, its head is a 1×1 convolution to the C_s channels there:
    x_s ← x_s ⊙ σ(w_s pool(A) + b_s),
which the next stage goes on with. Prefix tokens pass.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, H W = map.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.layers.grid import Grid
from models.layers.wrapped import Passed, Wrapper

WHO = "medusa"


class Medusa(Wrapper):
    """The body and a head for each stage.

    Args:
        model: any whose tokens make up a map behind every stage.
        width: channels of the largest map of the body; they double where a map is halved.
        levels: how often the body halves the image.

    Raises:
        ValueError: numbers that are none, or a model without maps.
    """

    def __init__(self, model: nn.Module, *, width: int = 16, levels: int = 3) -> None:
        super().__init__()
        values.whole(WHO, "width", width, fix="set wrapper.width")
        values.whole(WHO, "levels", levels, fix="set wrapper.levels, e.g. to 3")
        in_channels = channels_of(model)
        self.body = EncoderDecoder(in_channels, width, levels)
        self.heads = nn.ModuleList(nn.Conv2d(1, dim, 1) for dim in model.channels)
        for head in self.heads:
            nn.init.zeros_(head.bias)

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Passed:
        attention_B1HW = self.body(images)

        def behind(stage: int, x_BNC: Tensor, grid: Grid) -> Tensor:
            gates_BTC = self.gates(stage, attention_B1HW, grid)
            return torch.cat([x_BNC[:, : grid.prefix], x_BNC[:, grid.prefix :] * gates_BTC], dim=1)

        return model.through(images, behind=behind)

    def gates(self, stage: int, attention_B1HW: Tensor, grid: Grid) -> Tensor:
        """(B, H·W, C) in (0, 1), of the channels behind a stage."""
        pooled_B1HW = F.adaptive_avg_pool2d(attention_B1HW, grid[:2])
        return self.heads[stage](pooled_B1HW).sigmoid().flatten(2).mT


class EncoderDecoder(nn.Module):
    """Images (B, channels, height, width) → one map (B, 1, ·, ·) of half the sides, rounded up."""

    def __init__(self, in_channels: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(convolution(a, b, stride=2) for a, b in pairwise([in_channels, *widths]))
        self.up = nn.ModuleList(convolution(b, a) for a, b in pairwise(widths))
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x_BCHW, skipped = images, []
        for conv in self.down:
            x_BCHW = conv(x_BCHW)
            skipped.append(x_BCHW)
        x_BCHW = skipped.pop() + x_BCHW.mean((2, 3), keepdim=True)
        for conv in reversed(self.up):
            skip_BCHW = skipped.pop()
            x_BCHW = skip_BCHW + F.interpolate(conv(x_BCHW), size=skip_BCHW.shape[2:], mode="bilinear")
        return self.out(x_BCHW)


def convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3×3, with a norm over the whole map and GELU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(1, out_channels), nn.GELU())


def channels_of(model: nn.Module) -> int:
    """Of the images that a model takes; refuses one whose tokens make up no map."""
    what = type(model).__name__
    if model.reducers is not None:
        what = f"the reducer {type(next(iter(model.reducers.values()))).__name__}"
    if model.latent or model.reducers is not None:
        raise UserError(
            f"{WHO}: it gates the map behind every stage, got {what}, whose tokens make up none; choose another model, "
            "and leave reducer= out"
        )
    return next(module for module in model.stem.modules() if isinstance(module, nn.Conv2d)).in_channels
