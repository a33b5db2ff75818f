"""A plain backbone: one map throughout and `depth` equal blocks. A family is its stem, and what it has of its own.

Shapes: B = batch, N = prefix + H·W tokens, C = channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.backbones.stages import quarters
from models.layers.block import Block, drop_path_rates
from models.layers.patch_embed import cells


class Plain(Backbone, ABC):
    """Stem, `depth` equal blocks, norm, pool, head.

    A family says by the attributes and methods below what it has of its own, `stem_of` at the least. An option of its
    own is an argument of its constructor, which keeps it as a plain value before it calls this one.

    Args:
        attention: factory of the token mixers.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        patch_size: side of a token in pixels.
        dim, depth, num_heads: channels C, blocks, heads.
        mlp_ratio, drop_path, layer_scale: see `Block`.
        in_channels: of the images.

    The pyramid (`forward_pyramid`) taps four places at equal distance in the depth; all have the stride of a token.
    """

    prefix = 0  # tokens in front of the map
    token_joins: int | None = None  # the block in front of which they join; None: with the patches
    positioned = False  # whether the stem or the blocks encode positions themselves
    constant_drop_path = False  # the same in all blocks, or growing linearly
    norm_eps = 1e-6

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
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts(type(self).__name__, patch_size=patch_size, dim=dim, depth=depth, num_heads=num_heads)
        self.check(patch_size, dim)
        self.mlp_ratio, self.layer_scale = mlp_ratio, layer_scale
        image = pair(image_size)
        grid = Grid(*cells(image, patch_size))
        asked = grid._replace(prefix=self.prefix)
        grids = [asked if i >= (self.token_joins or 0) else grid for i in range(depth)]
        given = {"positioned": self.positioned, "image_size": image}
        sites = [Site(dim, num_heads, grids[i], 0, i, depth, "vit", **given) for i in range(depth)]
        rates = drop_path_rates(drop_path, depth, constant=self.constant_drop_path)
        # The weights that a seed gives go by what is made first: mixers, then blocks, then the rest.
        mixers = build(attention, sites)
        blocks = [self.block(*place) for place in zip(sites, mixers, rates, strict=True)]
        self.stem = self.stem_of(in_channels, dim, patch_size, grids[0])
        self.stages = quarters(blocks, self.token_joins)
        self.behind_stages(dim, num_heads)
        self.norm = self.norm_of(dim)
        self.head = classifier(dim, num_classes)
        self.channels, self.strides, self.grids = [dim] * 4, [patch_size] * 4, [*[grids[0]] * 3, asked]
        self.apply(init_weights)

    @abstractmethod
    def stem_of(self, in_channels: int, dim: int, patch_size: int, grid: Grid) -> nn.Module:
        """What makes tokens of images."""

    def check(self, patch_size: int, dim: int) -> None:
        """Refuses what the stem cannot be."""

    def block(self, site: Site, mixer: nn.Module, rate: float, **own: Any) -> Block:
        """A transformer block at a site; `own` are options of `Block` that a family adds."""
        shared = {"mlp_ratio": self.mlp_ratio, "layer_scale": self.layer_scale, "norm_eps": self.norm_eps}
        return Block(site.dim, mixer, drop_path=rate, **shared, **own)

    def behind_stages(self, dim: int, num_heads: int) -> None:
        """Makes what else there is between the blocks and the last norm."""

    def norm_of(self, dim: int) -> nn.Module:
        """The norm of the tokens that are pooled."""
        return nn.LayerNorm(dim, eps=self.norm_eps)

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The class token, or the mean over the map without one."""
        return x_BNC[:, 0] if grid.prefix else x_BNC.mean(1)
