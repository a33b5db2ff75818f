"""NiNformer: patches, equal blocks whose two branches share a norm, the mean over the map, and a Linear.

Source: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function, Abdullah & Aydin, 2024,
arXiv:2403.02411, and the authors' code, github.com/Abdullah-88/NiNformer. A block is x + mix(norm(x)), then
x + mlp(norm(x)) with the same norm; its mixing is `nin_gate`, which knows tokens by their places, so that there is no
position table. No norm stands in front of the head. The dropout of the code's MLPs is left out.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

from torch import nn

from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.backbones.stages import quarters
from models.layers.block import Block, drop_path_rates
from models.layers.patch_embed import PatchEmbed, cells
from models.layers.stem import PatchStem

EPS = 1e-5


class NiNformer(Backbone):
    """Patches, `depth` equal blocks, the mean over the map, head.

    Args:
        attention: factory of the token mixers.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        patch_size: side of a patch in pixels.
        dim, depth, num_heads: channels C, blocks, heads of mechanisms with heads.
        mlp_ratio, drop_path, layer_scale: see `Block`; drop path grows linearly over the blocks.

    The pyramid (`forward_pyramid`) taps four places at equal distance in the depth.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        patch_size: int = 4,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("NiNformer", patch_size=patch_size, dim=dim, depth=depth, num_heads=num_heads)
        image = pair(image_size)
        grid = Grid(*cells(image, patch_size))
        sites = [Site(dim, num_heads, grid, 0, block, depth, "vit", image_size=image) for block in range(depth)]
        shared = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale, "norm_eps": EPS, "shared_norm": True}
        pairs = zip(build(attention, sites), drop_path_rates(drop_path, depth), strict=True)
        blocks = [Block(dim, mixer, drop_path=rate, **shared) for mixer, rate in pairs]
        self.stem = PatchStem(PatchEmbed(in_channels, dim, patch_size))
        self.stages = quarters(blocks)
        self.norm, self.head = nn.Identity(), classifier(dim, num_classes)
        self.channels, self.strides, self.grids = [dim] * 4, [patch_size] * 4, [grid] * 4
        self.apply(init_weights)
