"""Images to tokens: one strided convolution over patches.

Shapes: B = batch, N = H·W tokens, C = channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.tokens import to_tokens


class PatchEmbed(nn.Module):
    """(B, channels, height, width) → (B, H·W, C) and the map (H, W); images are zero-padded to whole patches.

    Args:
        in_channels, dim: channels of the image and of the tokens.
        patch_size: stride of the convolution, one token per patch.
        kernel_size, padding: of the convolution; a kernel of the patch's size by default, a larger one overlaps.
        norm: on the tokens, e.g. `nn.LayerNorm(dim)`, or None.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: int,
        *,
        kernel_size: int | None = None,
        padding: int = 0,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, kernel_size or patch_size, stride=patch_size, padding=padding)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        height, width = images.shape[-2:]
        bottom, right = -height % self.patch_size, -width % self.patch_size
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        x_BCHW = self.proj(images)
        return self.norm(to_tokens(x_BCHW)), tuple(x_BCHW.shape[-2:])


def cells(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Map of an image at a stride, rounding up as the padding does."""
    return -(-image_size[0] // stride), -(-image_size[1] // stride)
