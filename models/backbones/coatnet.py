"""CoAtNet: convolution stages first, then stages of injected attention.

Source: CoAtNet: Marrying Convolution and Attention for All Data Sizes, Dai et al., NeurIPS 2021, arXiv:2106.04803,
table 3. Where this differs from the paper: attention comes as chosen (the paper: softmax with a relative bias over the
whole map), its stages begin with the paper's shortcut alone, max pooling and a projection, so that a mixer keeps its
channels, and the classifier is one Linear.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from torch import nn

from conf.errors import UserError
from models.attention import AttentionFactory
from models.backbones.base import check_counts
from models.backbones.hierarchical import Hierarchical, Slot, check_lists
from models.backbones.stages import per_stage, whole_heads
from models.layers.block import Stage
from models.layers.downsample import PoolDownsample
from models.layers.mbconv import MBConvBlock, MBConvDownsample, init_convolutions
from models.layers.stem import ConvStem


class CoAtNet(Hierarchical):
    """A convolutional stem, then stages of MBConv or attention that each halve the map; mean pooling.

    Args:
        attention: factory of the token mixers; a list has one entry per stage, None for those without attention.
        stem_dim: channels of the stem, which has stride 2.
        strides: of each stage against the one before it, 1 or 2.
        attention_stages: the stages with attention, 0-based; the others are made of MBConv.
        head_dim: channels per head.
        args, dims, depths, options: see `Hierarchical`.

    Raises:
        ValueError: strides other than 1 and 2, an attention stage that is not there, and what `Hierarchical` refuses.
    """

    kind = "hybrid"
    norm_eps = 1e-6
    only_patch_size = 4

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        *args: Any,
        dims: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int],
        stem_dim: int = 64,
        attention_stages: Sequence[int] = (2, 3),
        head_dim: int = 32,
        **options: Any,
    ) -> None:
        check_counts("CoAtNet", stem_dim=stem_dim, head_dim=head_dim)
        check_lists("CoAtNet", dims=dims, depths=depths, strides=strides)
        if not set(strides) <= {1, 2}:
            raise UserError(f"CoAtNet: strides must be 1 or 2, got {list(strides)}; set model.strides")
        mixers = per_stage("CoAtNet", attention, attention_stages, len(dims))[: max(attention_stages) + 1]
        heads = [whole_heads("CoAtNet", dim, head_dim) if s in attention_stages else 1 for s, dim in enumerate(dims)]
        self.before, self.steps, self.attention_stages = [stem_dim, *dims[:-1]], list(strides), list(attention_stages)
        super().__init__(mixers, *args, dims=dims, depths=depths, num_heads=heads, **options)

    def stage(self, s: int, places: list[Slot]) -> Stage:
        """One MBConv per place, of which the first also changes resolution and channels; or blocks of attention."""
        if s in self.attention_stages:
            return Stage([self.block(*place) for place in places], self.between(s))
        change = {"stride": self.steps[s], "drop_path": places[0].rate}
        first = MBConvDownsample(self.before[s], self.channels[s], **change)
        return Stage([MBConvBlock(self.channels[s], place.rate) for place in places[1:]], first)

    def between(self, s: int) -> PoolDownsample:
        return PoolDownsample(self.before[s], self.channels[s], self.steps[s])

    def stem_of(self, in_channels: int) -> ConvStem:
        """Two 3×3 convolutions, the first with stride 2."""
        dim = self.before[0]
        first = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1, bias=False)
        stem = ConvStem(first, nn.BatchNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1))
        init_convolutions(stem)
        return stem

    def strides_of(self, patch_size: int) -> list[int]:
        """From those against the stage before; the stem has 2."""
        return list(accumulate(self.steps, mul, initial=2))[1:]
