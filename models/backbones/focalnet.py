"""FocalNet: stages of blocks that modulate queries by their surroundings, or mix tokens in any other injected way.

Source: Focal Modulation Networks, Yang et al., NeurIPS 2022, arXiv:2203.11926. From L on, patches overlap, and norms
stand at the end of the branches in front of learned scales; the isotropic sizes are one stage of patches of 16 pixels.
The kernels of a stage are options of the attention `focal`. Odd maps are completed, where the authors' code leaves a
row or column out.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from typing import Any

from torch import nn

from models.attention import Site
from models.backbones.hierarchical import Hierarchical
from models.layers.block import Block
from models.layers.downsample import ConvDownsample, overlapping
from models.layers.stem import PatchStem


class FocalNet(Hierarchical):
    """Patches, then stages that halve the map; norm, mean, head. One stage alone is a plain backbone.

    Args:
        branch_norm: norms at the ends of the branches of blocks, see `models.layers.block.Block`.
        overlap: patches overlap: 7×7 convolutions with stride 4 in front, 3×3 ones between the stages.
        args, options: see `Hierarchical`.
    """

    def __init__(self, *args: Any, branch_norm: bool = False, overlap: bool = False, **options: Any) -> None:
        self.branch_norm, self.overlap = branch_norm, overlap
        super().__init__(*args, **options)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        return super().block(site, mixer, rate, branch_norm=self.branch_norm)

    def between(self, s: int) -> ConvDownsample:
        dim, out_dim = self.channels[s - 1 : s + 1]
        if self.overlap:
            return overlapping(dim, out_dim)
        return ConvDownsample(dim, out_dim, out_norm=nn.LayerNorm(out_dim, eps=self.patch_eps))

    def stem_of(self, in_channels: int) -> PatchStem:
        """The kernel of overlapping patches has 3 pixels more than their stride; the padding is that of the authors."""
        window = {"kernel_size": self.strides[0] + 3, "padding": 2} if self.overlap else {}
        return self.patches(in_channels, **window)
