"""PVT v2: four stages of overlapping patch embeddings and MLPs with a convolution; shortened keys or any other mixing.

Source: PVT v2: Improved Baselines with Pyramid Vision Transformer, Wang et al., CVMJ 2022, arXiv:2106.13797, sections
3.2 and 3.3 and table 1. As in the authors' code every stage ends with a norm, whose output goes on to the next one. The
keys shortened by 8, 4, 2 and 1 are the attention `spatial_reduction`; without position tables any image runs.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.attention import Grid, Site
from models.backbones.hierarchical import Hierarchical
from models.layers.block import Block, Stage
from models.layers.downsample import ConvDownsample, overlapping
from models.layers.gated import Carry
from models.layers.mbconv import init_convolutions
from models.layers.stem import PatchStem


class NormedStage(Stage):
    """A stage that ends with a LayerNorm: the pyramids have its output."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__(blocks, downsample)
        self.norm = nn.LayerNorm(blocks[-1].norm1.normalized_shape, eps=blocks[-1].norm1.eps)

    def forward(self, x_BNC: Tensor, grid: Grid, carry: Carry | None = None) -> tuple:
        x, *rest = super().forward(x_BNC, grid, carry=carry)
        return self.norm(x), *rest


class PVTv2(Hierarchical):
    """Overlapping patches, then stages that each halve the map and end with a norm; mean, head.

    The kernel of an embedding with stride S has 2·S - 1 pixels.

    Args:
        mlp_ratios: hidden over outer channels of each stage.
        args, options: see `Hierarchical`.
    """

    norm_eps = 1e-6
    order = ("stages", "stem")
    stage_type = NormedStage

    def __init__(self, *args: Any, mlp_ratios: Sequence[float], **options: Any) -> None:
        super().__init__(*args, mlp_ratio=mlp_ratios, **options)
        init_convolutions(self)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        return super().block(site, mixer, rate, mlp_kernel=3)

    def between(self, s: int) -> ConvDownsample:
        return overlapping(*self.channels[s - 1 : s + 1])

    def stem_of(self, in_channels: int) -> PatchStem:
        stride = self.strides[0]
        return self.patches(in_channels, kernel_size=2 * stride - 1, padding=stride - 1)

    def last_norm(self, dim: int) -> nn.Identity:
        """None: the last stage ends with one."""
        return nn.Identity()
