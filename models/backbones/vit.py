"""Vision Transformer: one resolution, global or any other injected token mixing.

Source: An Image is Worth 16x16 Words, Dosovitskiy et al., ICLR 2021, arXiv:2010.11929; sizes and training: DeiT,
Touvron et al., ICML 2021, arXiv:2012.12877.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Grid
from models.backbones.plain import Plain
from models.layers.class_attention import ClassToken
from models.layers.patch_embed import PatchEmbed
from models.layers.position import LearnedPosition


class ViT(Plain):
    """Patches, a learned position table, `depth` equal blocks, then the class token or the mean of the map.

    A family may let the class token join in front of a later block, `token_joins`, without a row in the table.

    Args:
        class_token: classify from a class token (DeiT) or from the mean over the map.
        args, options: see `Plain`.
    """

    def __init__(self, *args: Any, class_token: bool = True, **options: Any) -> None:
        self.prefix = int(class_token)
        super().__init__(*args, **options)

    def stem_of(self, in_channels: int, dim: int, patch_size: int, grid: Grid) -> "TokenStem":
        return TokenStem(PatchEmbed(in_channels, dim, patch_size), dim, grid)

    def behind_stages(self, dim: int, num_heads: int) -> None:
        """The class token, where it joins late."""
        if self.prefix and self.token_joins:
            self.stages[-1].downsample = ClassToken(dim)


class TokenStem(nn.Module):
    """Patch embedding, the class token in front, and the position table."""

    def __init__(self, patch_embed: PatchEmbed, dim: int, grid: Grid) -> None:
        super().__init__()
        self.patch_embed, self.prefix = patch_embed, grid.prefix
        self.class_token = nn.Parameter(torch.zeros(1, grid.prefix, dim)) if grid.prefix else None
        self.position = LearnedPosition(dim, grid)
        if grid.prefix:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, (height, width) = self.patch_embed(images)
        grid = Grid(height, width, self.prefix)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.position(x, grid), grid
