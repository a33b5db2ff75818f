"""The first module of a backbone: images (B, channels, height, width) → tokens (B, N, C) and their grid.

Shapes: B = batch, N = H·W tokens, C = channels.
"""

from torch import Tensor, nn

from models.layers.grid import Grid
from models.layers.patch_embed import PatchEmbed
from models.layers.tokens import to_tokens


class PatchStem(nn.Module):
    """A patch embedding as the whole stem, without prefix tokens."""

    def __init__(self, patch_embed: PatchEmbed) -> None:
        super().__init__()
        self.patch_embed = patch_embed

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x_BNC, (height, width) = self.patch_embed(images)
        return x_BNC, Grid(height, width)


class ConvStem(nn.Module):
    """The given layers on the image, one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x_BCHW = self.conv(images)
        return to_tokens(x_BCHW), Grid(*x_BCHW.shape[-2:])
