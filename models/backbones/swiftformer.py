"""SwiftFormer: stages of convolutional blocks, each of which ends with one of attention, additive or any other.

Source: SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications, Shaker et
al., ICCV 2023, arXiv:2303.15446, section 3.3. Two classifiers are averaged, the second of which learns from a teacher
where there is one. A mixer that does not normalise by itself gets tokens behind a LayerNorm, which is not the paper's.
Drop path grows over all blocks, as in timm; in the authors' code only the last of a stage has any, and they train with
none.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from typing import Any

from torch import Tensor, nn

from models.attention import Site
from models.backbones.classifier import classifier, init_weights
from models.backbones.hierarchical import Hierarchical, Slot
from models.layers.block import Block, Stage
from models.layers.conv_encoder import ConvEncoder, EncoderBlock
from models.layers.downsample import ConvDownsample
from models.layers.norm import TokenBatchNorm
from models.layers.stem import ConvStem


class SwiftFormer(Hierarchical):
    """Two convolutions with stride 2, then stages with a strided convolution between them; batch norm, mean, two heads.

    Attributes:
        distill_head: the second classifier; None without classes, and where another pool or head is chosen.

    Args:
        args, options: see `Hierarchical`; `layer_scale` is that of the blocks with mixers.
    """

    kind = "hybrid"
    positioned = True
    only_patch_size = 4

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        second = isinstance(self.head, nn.Linear)
        self.distill_head = classifier(self.channels[-1], self.head.out_features) if second else None
        if second:
            init_weights(self.distill_head)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and ".attn." not in name:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def mixes(self, site: Site) -> bool:
        """The last block of every stage."""
        return site.block == site.depth - 1

    def stage(self, s: int, places: list[Slot]) -> Stage:
        *before, last = places
        hidden = int(self.channels[s] * self.mlp_ratios[s])
        blocks = [EncoderBlock(self.channels[s], hidden, place.rate) for place in before]
        return Stage([*blocks, self.block(*last)], self.between(s) if s else None)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        block = super().block(site, mixer, rate, position=ConvEncoder(site.dim, site.dim))
        block.norm1 = block.norm1 if mixer.prenorm else nn.Identity()
        block.norm2 = TokenBatchNorm(site.dim)
        return block

    def between(self, s: int) -> ConvDownsample:
        dim, out_dim = self.channels[s - 1 : s + 1]
        return ConvDownsample(dim, out_dim, kernel_size=3, out_norm=TokenBatchNorm(out_dim))

    def stem_of(self, in_channels: int) -> ConvStem:
        dim = self.channels[0]
        first, second = nn.Conv2d(in_channels, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1)
        return ConvStem(first, nn.BatchNorm2d(dim // 2), nn.ReLU(), second, nn.BatchNorm2d(dim), nn.ReLU())

    def last_norm(self, dim: int) -> TokenBatchNorm:
        return TokenBatchNorm(dim)

    def logits(self, features: Tensor) -> Tensor:
        if self.distill_head is None:
            return self.head(features)
        of_labels, of_teacher = self.both_logits(features)
        return (of_labels + of_teacher) / 2

    def both_logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of the head that learns from labels, and of the one that learns from a teacher."""
        return self.head(features), self.distill_head(features)
