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

from torch import Tensor, nn

from conf.errors import UserError
from models.attention import AttentionFactory, Grid, build
from models.backbones.base import Backbone, check_counts, classifier, init_weights
from models.backbones.stages import check_lists, heads_of, per_stage, sites_of
from models.layers.block import Block, Stage, drop_path_rates
from models.layers.downsample import PoolDownsample
from models.layers.mbconv import MBConvBlock, MBConvDownsample, init_convolutions
from models.layers.tokens import to_tokens


class CoAtNet(Backbone):
    """A convolutional stem, then stages of MBConv or attention that each halve the map; mean pooling.

    Args:
        attention: factory of the token mixers; a list has one entry per stage, None for those without attention.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        stem_dim: channels of the stem, which has stride 2.
        dims, depths: channels and blocks of each stage.
        strides: of each stage against the one before it, 1 or 2.
        attention_stages: the stages with attention, 0-based; the others are made of MBConv.
        head_dim: channels per head.
        drop_path, layer_scale, mlp_ratio: see `Block`; drop path grows linearly over the blocks.

    Raises:
        ValueError: lists of unequal length or with entries below 1, strides other than 1 and 2, or an attention stage
            that is not there.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        stem_dim: int = 64,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 5, 2),
        strides: Sequence[int] = (2, 2, 2, 2),
        attention_stages: Sequence[int] = (2, 3),
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("CoAtNet", stem_dim=stem_dim, head_dim=head_dim)
        check_lists("CoAtNet", dims=dims, depths=depths, strides=strides)
        self.channels, self.strides = list(dims), of_the_image(strides)
        factories = per_stage("CoAtNet", attention, attention_stages, len(dims))
        heads = {s: heads_of("CoAtNet", dims[s], head_dim) for s in attention_stages}
        shape = {"strides": self.strides, "dims": dims, "depths": depths, "num_heads": heads}
        sites = sites_of("hybrid", image_size, **shape, stages=sorted(heads))
        mixers = iter(build(factories[: max(heads) + 1], sites))
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
        stages = []
        for s, (before, dim) in enumerate(zip([stem_dim, *dims[:-1]], dims, strict=True)):
            of_stage = [next(rates) for _ in range(depths[s])]
            if s in attention_stages:
                blocks = [Block(dim, next(mixers), drop_path=rate, **options) for rate in of_stage]
                stages.append(Stage(blocks, PoolDownsample(before, dim, strides[s])))
            else:
                stages.append(convolution_stage(before, dim, strides[s], of_stage))
        self.stem = Stem(in_channels, stem_dim)
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)


def of_the_image(strides: Sequence[int]) -> list[int]:
    """The stride of each stage against the image, from those against the stage before; the stem has 2."""
    if not set(strides) <= {1, 2}:
        raise UserError(f"CoAtNet: strides must be 1 or 2, got {list(strides)}; set model.strides")
    return list(accumulate(strides, mul, initial=2))[1:]


def convolution_stage(before: int, dim: int, stride: int, rates: Sequence[float]) -> Stage:
    """One MBConv per drop path rate; the first also changes resolution and channels."""
    first = MBConvDownsample(before, dim, stride=stride, drop_path=rates[0])
    return Stage([MBConvBlock(dim, rate) for rate in rates[1:]], first)


class Stem(nn.Module):
    """Two 3×3 convolutions, the first with stride 2: (B, channels, height, width) → (B, N, C) and the map."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        init_convolutions(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x_BCHW = self.conv(images)
        return to_tokens(x_BCHW), Grid(*x_BCHW.shape[-2:])
