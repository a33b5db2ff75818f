"""Twins: four stages of patches with a convolutional position behind their first block; Twins-SVT and Twins-PCPVT.

Source: Twins: Revisiting the Design of Spatial Attention in Vision Transformers, Chu et al., NeurIPS 2021,
arXiv:2104.13840, sections 3.1 and 3.2; code: Meituan-AutoML/Twins at commit c1ff671. The position is the PEG of Chu et
al., arXiv:2102.10882: x + a depth-wise 3×3 convolution. Twins-SVT has the attention `twins`, Twins-PCPVT
`spatial_reduction`. Maps that a ratio of the keys does not divide are padded; the authors' code drops the rest.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.attention import Grid, Site
from models.backbones.hierarchical import Hierarchical
from models.layers.block import Block, Stage
from models.layers.downsample import ConvDownsample
from models.layers.gated import Carry
from models.layers.mbconv import init_convolutions
from models.layers.position import ConvPosition


class Encoding(ConvPosition):
    """A position encoding whose kernels do not decay."""

    undecayed = ("proj.weight",)


class EncodedStage(Stage):
    """A stage whose position stands behind its first block: in front of the second, or at the end of an only one."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None = None) -> None:
        super().__init__(blocks, downsample)
        self.position = Encoding(blocks[0].norm1.normalized_shape[0]) if len(blocks) == 1 else None

    def forward(self, x_BNC: Tensor, grid: Grid, carry: Carry | None = None) -> tuple:
        x, grid, *rest = super().forward(x_BNC, grid, carry=carry)
        return (x if self.position is None else self.position(x, grid)), grid, *rest


class Twins(Hierarchical):
    """Patches, then stages that each halve the map, all of them with a norm behind the convolution; norm, mean, head.

    Args:
        mlp_ratios: hidden over outer channels of each stage.
        args, options: see `Hierarchical`.
    """

    positioned = True
    norm_eps = 1e-6
    stage_type = EncodedStage

    def __init__(self, *args: Any, mlp_ratios: Sequence[float], **options: Any) -> None:
        super().__init__(*args, mlp_ratio=mlp_ratios, **options)
        init_convolutions(self)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        return super().block(site, mixer, rate, position=Encoding(site.dim) if site.block == 1 else None)

    def between(self, s: int) -> ConvDownsample:
        dim, out_dim = self.channels[s - 1 : s + 1]
        return ConvDownsample(dim, out_dim, out_norm=nn.LayerNorm(out_dim, eps=self.patch_eps))
