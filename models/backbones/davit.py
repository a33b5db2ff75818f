"""DaViT: pairs of a window block and a channel block, or any other injected token mixing, in four stages.

Source: DaViT: Dual Attention Vision Transformers, Ding et al., ECCV 2022, arXiv:2204.03645, sections 3.1 to 3.4. As in
the authors' code every block has a depth-wise convolution as position encoding in front of both its branches, and
drop path grows over all blocks, two per pair.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.attention import Site
from models.backbones.hierarchical import Hierarchical, check_lists
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.position import ConvPosition
from models.layers.stem import PatchStem


class DaViT(Hierarchical):
    """A 7×7 convolution with stride 4, stages with LayerNorm and a 2×2 convolution between them, mean, norm, head.

    Args:
        depths: pairs of blocks of each stage. In every second block `num_heads` are groups of channels.
        downsample_kernel: side of the convolution between stages; 3 overlaps.
        args, options: see `Hierarchical`.
    """

    positioned = True
    only_patch_size = 4
    norm_pooled = True

    def __init__(self, *args: Any, depths: Sequence[int], downsample_kernel: int = 2, **options: Any) -> None:
        check_lists("DaViT", depths=depths)
        self.downsample_kernel = downsample_kernel
        super().__init__(*args, depths=[2 * pairs for pairs in depths], **options)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        position, mlp_position = ConvPosition(site.dim), ConvPosition(site.dim)
        return super().block(site, mixer, rate, position=position, mlp_position=mlp_position)

    def between(self, s: int) -> ConvDownsample:
        dim, out_dim = self.channels[s - 1 : s + 1]
        norm = nn.LayerNorm(dim, eps=self.patch_eps)
        return ConvDownsample(dim, out_dim, kernel_size=self.downsample_kernel, norm=norm)

    def stem_of(self, in_channels: int) -> PatchStem:
        return self.patches(in_channels, kernel_size=7, padding=3)

    def level_norm(self, dim: int) -> nn.Module:
        """LayerNorm, as in the authors' detection and segmentation backbones."""
        return nn.LayerNorm(dim, eps=self.norm_eps)
