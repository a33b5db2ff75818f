"""Images to tokens: one strided convolution over non-overlapping patches.

Shapes: B = batch, N = H·W tokens, C = channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.tokens import to_tokens


class PatchEmbed(nn.Module):
    """(B, channels, height, width) → (B, H·W, C) and the map (H, W); images are zero-padded to whole patches.

    Args:
        in_channels, dim: channels of the image and of the tokens.
        patch_size: side of a patch in pixels.
        norm: LayerNorm on the tokens (Swin, ConvNeXt) or not (ViT).
        norm_eps: of that LayerNorm.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, *, norm: bool = False, norm_eps: float = 1e-5):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if norm else nn.Identity()

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
