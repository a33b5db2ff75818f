"""The first module of a backbone: images (B, channels, height, width) → tokens (B, N, C) and their grid.

Shapes: B = batch, N = H·W tokens, C = channels.
"""

from torch import Tensor, nn

from conf.errors import UserError
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


def widths_of(who: str, patch_size: int, dim: int) -> list[int]:
    """Channels behind each of the strided convolutions that make patches, which double up to `dim`.

    Raises:
        ValueError: a patch size that is no power of two, or channels that cannot be halved as often.
    """
    steps = patch_size.bit_length() - 1
    if patch_size != 1 << steps or not steps:
        raise UserError(f"{who}: patch_size must be a power of two from 2, got {patch_size}; set model.patch_size=16")
    if dim % (1 << (steps - 1)):
        raise UserError(
            f"{who}: {steps} convolutions double the channels up to a multiple of {1 << (steps - 1)}, got dim={dim}; "
            "change model.dim or model.patch_size"
        )
    return [dim >> step for step in reversed(range(steps))]
