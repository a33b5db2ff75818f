"""BiFormer: four stages of blocks with a convolutional position encoding, and bi-level routing or any other mixing.

Source: BiFormer, Zhu et al., CVPR 2023, arXiv:2303.08810, section 3.3 and figure 3; the layout of Swin-T with the same
attention (STL, table 6 of the paper) is the same class with `layout="swin"`. Batch norm stands behind the convolutions,
and before the pooling.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from typing import Any

from torch import nn

from conf.errors import UserError
from models.attention import Site
from models.backbones.hierarchical import Hierarchical
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.norm import TokenBatchNorm
from models.layers.patch_embed import PatchEmbed
from models.layers.position import ConvPosition
from models.layers.stem import ConvStem, PatchStem

LAYOUTS = ("biformer", "swin")


class BiFormer(Hierarchical):
    """Overlapping convolutions from stage to stage; position, attention and MLP in every block; batch norm, mean, head.

    Args:
        layout: "biformer", or "swin": patches of 4×4 pixels, batch norm in front of 2×2 convolutions between the
            stages, and no position encoding.
        args, options: see `Hierarchical`.

    Raises:
        ValueError: an unknown layout, and what `Hierarchical` refuses.
    """

    norm_eps = 1e-6
    only_patch_size = 4

    def __init__(self, *args: Any, layout: str = "biformer", **options: Any) -> None:
        if layout not in LAYOUTS:
            raise UserError(f"BiFormer: layout must be {' or '.join(LAYOUTS)}, got {layout!r}; set model.layout")
        self.overlapping = self.positioned = layout == "biformer"
        super().__init__(*args, **options)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        return super().block(site, mixer, rate, position=ConvPosition(site.dim) if self.positioned else None)

    def between(self, s: int) -> ConvDownsample:
        dim, out_dim = self.channels[s - 1 : s + 1]
        if self.overlapping:
            return ConvDownsample(dim, out_dim, kernel_size=3, out_norm=TokenBatchNorm(out_dim))
        return ConvDownsample(dim, out_dim, norm=TokenBatchNorm(dim))

    def stem_of(self, in_channels: int) -> nn.Module:
        dim = self.channels[0]
        if not self.overlapping:
            return PatchStem(PatchEmbed(in_channels, dim, 4, norm=TokenBatchNorm(dim)))
        first = nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1)
        second = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        return ConvStem(first, nn.BatchNorm2d(dim // 2), nn.GELU(), second, nn.BatchNorm2d(dim))

    def last_norm(self, dim: int) -> TokenBatchNorm:
        return TokenBatchNorm(dim)

    def level_norm(self, dim: int) -> nn.Module:
        """LayerNorm over the channels, as in the authors' detection and segmentation backbones."""
        return nn.LayerNorm(dim, eps=self.norm_eps)
