"""PatchConvNet: a convolutional stem, equal residual blocks of one branch, and aggregation by attention at the end.

Source: Augmenting Convolutional networks with attention-based aggregation, Touvron et al., 2021, arXiv:2112.13692,
section 3. A block is x + γ mix(norm(x)), where the paper has `patch_conv`; it has no MLP, and positions are not
encoded. What pools is `attention_aggregation`, which brings the norms that other backbones have in front of their
pool; with another `pool` there is such a norm here too. As in the authors' code drop path is the same in all blocks,
and there is none in the aggregation.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.backbones.stages import quarters
from models.layers.block import Block, drop_path_rates
from models.layers.patch_embed import cells
from models.layers.pooled import Pool
from models.layers.stem import ConvStem, widths_of

EPS = 1e-6


class PatchConvNet(Backbone):
    """Strided convolutions, `depth` equal blocks, the aggregation, and a Linear of what it gives.

    Args:
        attention: factory of the token mixers.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        patch_size: pixels of a token's side, a power of two: as many convolutions as halve it to one.
        dim, depth, num_heads: channels C, blocks, heads of mechanisms with heads.
        aggregation: factory of the pool, as in conf/pool/attention_aggregation.yaml; `pool` takes its place.
        drop_path: of every block.
        layer_scale: initial value of γ; None for no scale.

    Raises:
        ValueError: a patch size that is no power of two, channels that it does not divide, and what mixers refuse.

    The pyramid (`forward_pyramid`) taps four places at equal distance in the depth.
    """

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
        aggregation: Callable[..., Pool],
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-4,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("PatchConvNet", patch_size=patch_size, dim=dim, depth=depth, num_heads=num_heads)
        widths = widths_of("PatchConvNet", patch_size, dim)
        grid, image = Grid(*cells(pair(image_size), patch_size)), pair(image_size)
        sites = [Site(dim, num_heads, grid, 0, block, depth, "vit", image_size=image) for block in range(depth)]
        rates = drop_path_rates(drop_path, depth, constant=True)
        blocks = [
            Block(dim, mixer, mlp_ratio=0, drop_path=rate, layer_scale=layer_scale, norm_eps=EPS)
            for mixer, rate in zip(build(attention, sites), rates, strict=True)
        ]
        self.stem = stem_of([in_channels, *widths])
        self.stages = quarters(blocks)
        self.norm, self.own_pool = nn.Identity(), aggregation
        self.head = classifier(dim, num_classes)
        self.channels, self.strides, self.grids = [dim] * 4, [patch_size] * 4, [grid] * 4
        self.apply(init_weights)
        for block in blocks:
            for name in getattr(block.attn, "POINTWISE", ()):
                getattr(block.attn, name).reset_parameters()

    def last_norm(self, dim: int) -> nn.LayerNorm:
        """In front of a pool that has none."""
        return nn.LayerNorm(dim, eps=EPS)


def stem_of(widths: Sequence[int]) -> ConvStem:
    """Convolutions with stride 2, without biases and norms, and GELU between them.

    Args:
        widths: channels of the image, and behind each convolution.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GELU()]
    return ConvStem(*layers[:-1])
