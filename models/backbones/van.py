"""VAN: four stages of overlapping patches, with batch norms around large kernel attention or any other token mixing.

Source: Visual Attention Network, Guo et al., CVMJ 2023, arXiv:2202.09741, section 3.3 and table 3. The layout is that
of PVT v2: every stage ends with a LayerNorm, whose output goes on to the next one. Batch norms stand behind the patches
and in front of both branches of a block, whose MLP has a convolution inside. Its attention is `large_kernel`. The third
stage of B6 has 384 channels in the authors' code, as here.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from typing import Any

from models.backbones.hierarchical import Slot
from models.backbones.pvt_v2 import PVTv2
from models.layers.block import Stage
from models.layers.downsample import ConvDownsample
from models.layers.mbconv import init_pointwise
from models.layers.norm import TokenBatchNorm
from models.layers.patch_embed import PatchEmbed
from models.layers.stem import PatchStem


class VAN(PVTv2):
    """Overlapping patches, then stages that each halve the map and end with a norm; mean, head.

    Products of blocks are 1×1 convolutions in the authors' code and start as these do, those of mixers where they say
    so in `POINTWISE`.

    Args:
        mlp_ratios: hidden over outer channels of each stage.
        args, options: see `Hierarchical`.
    """

    def __init__(self, *args: Any, mlp_ratios: Sequence[float], **options: Any) -> None:
        super().__init__(*args, mlp_ratios=mlp_ratios, **options)
        for block in (block for stage in self.stages for block in stage.blocks):
            for name in getattr(block.attn, "POINTWISE", ()):
                init_pointwise(getattr(block.attn, name))
            init_pointwise(block.mlp.fc1)
            init_pointwise(block.mlp.fc2)

    def stage(self, s: int, places: list[Slot]) -> Stage:
        stage = super().stage(s, places)
        for block in stage.blocks:
            block.norm1, block.norm2 = TokenBatchNorm(self.channels[s]), TokenBatchNorm(self.channels[s])
        return stage

    def between(self, s: int) -> ConvDownsample:
        dim, out_dim = self.channels[s - 1 : s + 1]
        return ConvDownsample(dim, out_dim, kernel_size=3, out_norm=TokenBatchNorm(out_dim))

    def patches(self, in_channels: int, **window: int) -> PatchStem:
        """As of every family, with a batch norm behind them."""
        dim = self.channels[0]
        return PatchStem(PatchEmbed(in_channels, dim, self.strides[0], **window, norm=TokenBatchNorm(dim)))
