"""SHViT: patches of 16 pixels, a stage of convolutions, then stages with attention, single-head or any other, in them.

Source: SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design, Yun & Ro, CVPR 2024, arXiv:2401.16456,
section 3.3 and table 1. A block is a depth-wise convolution, the mixer, and an MLP, each with a residual and with batch
norms behind every product. A mixer that does not normalise by itself gets tokens behind a LayerNorm, which is not the
paper's. Odd maps are rounded up.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from timm.layers import SqueezeExcite
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import AttentionFactory, Site
from models.backbones.hierarchical import Hierarchical, Slot
from models.backbones.stages import per_stage
from models.layers.batch_normed import LocalBlock, NormedMlp, NormedPosition
from models.layers.block import Block, Stage
from models.layers.downsample import reduced
from models.layers.norm import TokenBatchNorm
from models.layers.stem import ConvStem
from models.layers.tokens import to_map, to_tokens


class SHViT(Hierarchical):
    """Convolutions with stride 2 to patches, then stages of blocks that halve the map; mean, batch norm, head.

    Args:
        attention: factory of the token mixers; a list has one entry per stage, None for those without attention.
        attention_stages: the stages with mixers, 0-based; blocks of the others have none.
        args, dims, patch_size, mlp_ratio, options: see `Hierarchical`; a patch has a power of two of pixels, and the
            channels double with each convolution in front.

    Raises:
        ValueError: patches of another size, channels that cannot be halved so often, and what `Hierarchical` refuses.
    """

    kind = "hybrid"
    norm_pooled = True
    positioned = True

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        *args: Any,
        dims: Sequence[int],
        patch_size: int = 16,
        mlp_ratio: float = 2.0,
        attention_stages: Sequence[int] = (1, 2),
        **options: Any,
    ) -> None:
        mixers = per_stage("SHViT", attention, attention_stages, len(dims))[: max(attention_stages) + 1]
        _check_stem(patch_size, dims[0])
        self.attention_stages = list(attention_stages)
        super().__init__(mixers, *args, dims=dims, patch_size=patch_size, mlp_ratio=mlp_ratio, **options)
        for module in self.modules():  # products in front of norms start as in PyTorch
            for product, _ in getattr(module, "FOLDS", ()):
                getattr(module, product).reset_parameters()

    def stage(self, s: int, places: list[Slot]) -> Stage:
        entry = self.between(s) if s else None
        if s in self.attention_stages:
            return Stage([self.block(*place) for place in places], entry)
        return Stage([LocalBlock(self.channels[s], self.mlp_ratios[s], place.rate) for place in places], entry)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        block = super().block(site, mixer, rate, position=NormedPosition(site.dim))
        block.norm1 = block.norm1 if mixer.prenorm else nn.Identity()
        block.norm2, block.mlp = nn.Identity(), NormedMlp(site.dim, int(site.dim * self.mlp_ratios[site.stage]))
        return block

    def between(self, s: int) -> nn.Module:
        return StageEntry(*self.channels[s - 1 : s + 1], mlp_ratio=self.mlp_ratios[s])

    def stem_of(self, in_channels: int) -> ConvStem:
        count = self.strides[0].bit_length() - 1
        widths = [in_channels, *(self.channels[0] >> (count - 1 - i) for i in range(count))]
        layers: list[nn.Module] = []
        for dim, out_dim in pairwise(widths):
            layers += [nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False), nn.BatchNorm2d(out_dim), nn.ReLU()]
        return ConvStem(*layers[:-1])

    def last_norm(self, dim: int) -> TokenBatchNorm:
        return TokenBatchNorm(dim)


class StageEntry(nn.Module):
    """`(x, grid) -> (x, grid)`: convolution and MLP, the merging to half the map, and once more both."""

    def __init__(self, dim: int, out_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.conv_in, self.mlp_in = NormedPosition(dim, gain=1.0), NormedMlp(dim, int(dim * mlp_ratio))
        self.merge = Merging(dim, out_dim)
        self.conv_out, self.mlp_out = NormedPosition(out_dim, gain=1.0), NormedMlp(out_dim, int(out_dim * mlp_ratio))

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        x = self.conv_in(x_BNC, grid)
        x, grid = self.merge(x + self.mlp_in(x), grid)
        x = self.conv_out(x, grid)
        return x + self.mlp_out(x), grid


class Merging(nn.Module):
    """An inverted bottleneck of four times the channels, with stride 2 and squeeze-and-excitation, without residual."""

    FOLDS = (("fc1", "norm1"), ("conv", "norm2"), ("fc2", "norm3"))

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.fc1, self.norm1 = nn.Linear(dim, hidden, bias=False), TokenBatchNorm(hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, 2, 1, groups=hidden, bias=False)
        self.norm2, self.act = nn.BatchNorm2d(hidden), nn.ReLU()
        self.se = SqueezeExcite(hidden, 0.25)
        self.fc2, self.norm3 = nn.Linear(hidden, out_dim, bias=False), TokenBatchNorm(out_dim)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        x_BCHW = to_map(self.act(self.norm1(self.fc1(x_BNC))), grid)
        x_BCHW = self.se(self.act(self.norm2(self.conv(x_BCHW))))
        return self.norm3(self.fc2(to_tokens(x_BCHW))), reduced(grid)


def _check_stem(patch_size: int, dim: int) -> None:
    if not isinstance(patch_size, int) or patch_size < 2 or patch_size & (patch_size - 1):
        raise UserError(f"SHViT: patch_size must be a power of two from 2 on, got {patch_size}; set model.patch_size")
    if dim % (patch_size // 2):
        raise UserError(
            f"SHViT: dims must begin with a multiple of {patch_size // 2}, the channels of its first convolutions, got "
            f"{dim}; set model.dims or model.patch_size"
        )
