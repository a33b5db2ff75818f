"""Vision Transformer: one resolution, global or any other injected token mixing.

Source: An Image is Worth 16x16 Words, Dosovitskiy et al., ICLR 2021, arXiv:2010.11929; sizes and training: DeiT,
Touvron et al., ICML 2021, arXiv:2012.12877.
Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.backbones.stages import quarters
from models.layers.block import Block, drop_path_rates
from models.layers.class_attention import ClassToken
from models.layers.patch_embed import PatchEmbed, cells
from models.layers.position import LearnedPosition


class ViT(Backbone):
    """Patches, a learned position table, `depth` equal blocks, then the class token or the mean of the map.

    A family may let the class token join in front of a later block, `token_joins`, without a row in the table.

    Args:
        attention: factory of the token mixers.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        patch_size: side of a patch in pixels.
        dim, depth, num_heads: channels C, blocks, heads.
        class_token: classify from a class token (DeiT) or from the mean over the map.
        drop_path, layer_scale, mlp_ratio: see `Block`; drop path grows linearly over the blocks.

    The pyramid (`forward_pyramid`) taps four places at equal distance in the depth; all have the stride of a patch.
    """

    token_joins: int | None = None  # the block; None: with the patches

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        patch_size: int = 16,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts(type(self).__name__, patch_size=patch_size, dim=dim, depth=depth, num_heads=num_heads)
        image, joins = pair(image_size), self.token_joins or 0
        grid = Grid(*cells(image, patch_size))
        asked = grid._replace(prefix=int(class_token))  # from where the class token is there
        grids = [asked if block >= joins else grid for block in range(depth)]
        sites = [Site(dim, num_heads, grids[i], 0, i, depth, "vit", image_size=image) for i in range(depth)]
        rates = drop_path_rates(drop_path, depth)
        blocks = [
            Block(dim, mixer, mlp_ratio=mlp_ratio, drop_path=rate, layer_scale=layer_scale)
            for mixer, rate in zip(build(attention, sites), rates, strict=True)
        ]
        self.stem = TokenStem(PatchEmbed(in_channels, dim, patch_size), dim, grids[0])
        self.stages = quarters(blocks, self.token_joins)
        if class_token and joins:
            self.stages[-1].downsample = ClassToken(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = classifier(dim, num_classes)
        self.channels, self.strides, self.grids = [dim] * 4, [patch_size] * 4, [*[grids[0]] * 3, asked]
        self.apply(init_weights)

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The class token, or the mean over the map without one."""
        return x_BNC[:, 0] if grid.prefix else x_BNC.mean(1)


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
