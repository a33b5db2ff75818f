"""Flowformer for images: four stages of patches without norms, one position table, scaled MLPs; flow attention or any.

Source: Flowformer: Linearizing Transformers with Conservation Flows, Wu et al., ICML 2022, arXiv:2202.06258, section
4.3; code: Flowformer_CV of thuml/Flowformer at commit 61f5d8c. Its attention is `flow`, with 12 heads in every
stage. Layer scale stands on the MLPs only. The authors' code takes images of one size; here the table is resized.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from torch import nn

from models.attention import Site
from models.backbones.hierarchical import Hierarchical
from models.backbones.pvt import TableStem
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.patch_embed import PatchEmbed


class Flowformer(Hierarchical):
    """Patches with a position table, then stages that each halve the map by a convolution; norm, mean, head."""

    norm_eps = 1e-6

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        block = super().block(site, mixer, rate)
        block.scale1 = nn.Identity()
        return block

    def between(self, s: int) -> ConvDownsample:
        return ConvDownsample(*self.channels[s - 1 : s + 1])

    def stem_of(self, in_channels: int) -> TableStem:
        return TableStem(PatchEmbed(in_channels, self.channels[0], self.strides[0]), self.channels[0], self.grids[0])
