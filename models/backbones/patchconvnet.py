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
from typing import Any

from torch import nn

from models.attention import Grid
from models.backbones.plain import Plain
from models.layers.pooled import Pool
from models.layers.stem import ConvStem, widths_of


class PatchConvNet(Plain):
    """Strided convolutions, `depth` equal blocks, the aggregation, and a Linear of what it gives.

    Args:
        aggregation: factory of the pool, as in conf/pool/attention_aggregation.yaml; `pool` takes its place.
        layer_scale: initial value of γ; None for no scale.
        args, options: see `Plain`, but `mlp_ratio`; `patch_size` is a power of two: as many convolutions as halve it.

    Raises:
        ValueError: a patch size that is no power of two, channels that it does not divide, and what mixers refuse.
    """

    constant_drop_path = True

    def __init__(
        self, *args: Any, aggregation: Callable[..., Pool], layer_scale: float | None = 1e-4, **options: Any
    ) -> None:
        super().__init__(*args, mlp_ratio=0, layer_scale=layer_scale, **options)
        self.own_pool = aggregation
        for block in (block for stage in self.stages for block in stage.blocks):
            for name in getattr(block.attn, "POINTWISE", ()):
                getattr(block.attn, name).reset_parameters()

    def check(self, patch_size: int, dim: int) -> None:
        self.widths = widths_of("PatchConvNet", patch_size, dim)

    def stem_of(self, in_channels: int, dim: int, patch_size: int, grid: Grid) -> ConvStem:
        return stem_of([in_channels, *self.widths])

    def norm_of(self, dim: int) -> nn.Identity:
        return nn.Identity()

    def last_norm(self, dim: int) -> nn.LayerNorm:
        """In front of a pool that has none."""
        return nn.LayerNorm(dim, eps=self.norm_eps)


def stem_of(widths: Sequence[int]) -> ConvStem:
    """Convolutions with stride 2, without biases and norms, and GELU between them.

    Args:
        widths: channels of the image, and behind each convolution.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GELU()]
    return ConvStem(*layers[:-1])
