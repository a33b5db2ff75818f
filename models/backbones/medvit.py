"""MedViT: stages of convolutions in groups, whose last blocks mix tokens of a share of their channels.

Source: MedViT: A Robust Vision Transformer for Generalized Medical Image Classification, Manzari et al., Computers in
Biology and Medicine 2023, arXiv:2302.09462, section 3; code: Omid-Nejati/MedViT at commit 1abcaf6. Its attention is
`softmax` in the layout `runs`. The augmentation of features that the paper describes is not in the code, nor here.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from timm.layers import make_divisible
from torch import nn

from conf.errors import UserError
from models.attention import AttentionFactory, Grid, Mixer, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier
from models.backbones.hierarchical import check_lists
from models.backbones.stages import per_stage, whole_heads
from models.layers.block import Stage, drop_path_rates
from models.layers.hybrid_block import ConvBlock, HybridBlock
from models.layers.norm import TokenBatchNorm
from models.layers.patch_embed import cells
from models.layers.stem import ConvStem

SHARE = 0.75  # of the channels of a block with a mixer, those that it mixes
RATIOS = {"conv": 3, "hybrid": 2}  # hidden over outer channels of MLPs


class MedViT(Backbone):
    """A stem with stride 4, then stages whose first blocks, but that of the first, halve the map; norm, mean, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage, None for those without.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        stem_dims: channels of the first, second, and last two convolutions of the stem.
        dims, mixed_dims, depths: of each stage, channels of blocks without and with a mixer, and how many blocks.
        every: each so-many-th block of a stage has a mixer; 0 for none.
        head_dim: channels of a head.
        drop_path: see `HybridBlock`; it grows linearly over the blocks.
        in_channels: of the images.

    Raises:
        ValueError: lists of unequal length, no mixer at all, or channels that are no whole heads.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        stem_dims: Sequence[int],
        dims: Sequence[int],
        mixed_dims: Sequence[int],
        depths: Sequence[int],
        every: Sequence[int],
        head_dim: int = 32,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("MedViT", head_dim=head_dim)
        check_lists("MedViT", dims=dims, mixed_dims=mixed_dims, depths=depths, every=[n + 1 for n in every])
        check_lists("MedViT", stem_dims=stem_dims)
        self.strides, self.head_dim, pixels = [4 << s for s in range(len(dims))], head_dim, pair(image_size)
        self.grids = [Grid(*cells(pixels, stride)) for stride in self.strides]
        mixes = [[bool(n) and b % n == n - 1 for b in range(depth)] for n, depth in zip(every, depths, strict=True)]
        widths = [mixed_dims[s] if mixed else dims[s] for s, stage in enumerate(mixes) for mixed in stage]
        for width in widths:
            whole_heads("MedViT", width, head_dim)
        self.channels = [widths[end - 1] for end in accumulate(depths)]
        sites = [
            self._site(s, b, depths[s], mixed_dims[s], pixels)
            for s, stage in enumerate(mixes)
            for b, mixed in enumerate(stage)
            if mixed
        ]
        mixers = {(mixer.site.stage, mixer.site.block): mixer for mixer in self._mixers(attention, sites, len(dims))}
        rates = drop_path_rates(drop_path, len(widths))
        places = [(s, b) for s, depth in enumerate(depths) for b in range(depth)]
        blocks = [
            self._block(place, before, width, mixers.get(place), rate)
            for place, before, width, rate in zip(places, [stem_dims[-1], *widths], widths, rates, strict=False)
        ]
        self.stem = stem(in_channels, stem_dims)
        self.stages = nn.ModuleList(Stage(blocks[a:b]) for a, b in pairwise(accumulate(depths, initial=0)))
        self.norm, self.head = TokenBatchNorm(widths[-1]), classifier(widths[-1], num_classes)
        self.apply(init_weights)

    def _site(self, s: int, block: int, depth: int, out_dim: int, pixels: tuple[int, int]) -> Site:
        width = make_divisible(int(SHARE * out_dim), self.head_dim)
        if width >= out_dim:
            raise UserError(
                f"MedViT: mixed_dims must leave a quarter of the channels, in heads of {self.head_dim}, besides, "
                f"got {out_dim} in stage {s}, of which it takes {width}; set model.mixed_dims or model.head_dim"
            )
        heads = width // self.head_dim
        return Site(width, heads, self.grids[s], s, block, depth, "hybrid", positioned=True, image_size=pixels)

    def _mixers(
        self, attention: AttentionFactory | Sequence[AttentionFactory | None], sites: list[Site], stages: int
    ) -> list[Mixer]:
        chosen = sorted({site.stage for site in sites})
        if not chosen:
            raise UserError("MedViT: a block must have a mixer, got every=0 in all stages; set model.every")
        return build(per_stage("MedViT", attention, chosen, stages)[: chosen[-1] + 1], sites)

    def _block(
        self, place: tuple[int, int], dim: int, out_dim: int, mixer: Mixer | None, rate: float
    ) -> ConvBlock | HybridBlock:
        shared = {"head_dim": self.head_dim, "stride": 2 if place[0] and not place[1] else 1, "drop_path": rate}
        if mixer is None:
            return ConvBlock(dim, out_dim, mlp_ratio=RATIOS["conv"], **shared)
        return HybridBlock(dim, out_dim, mixer, mlp_ratio=RATIOS["hybrid"], **shared)


def stem(in_channels: int, dims: Sequence[int]) -> ConvStem:
    """Four 3×3 convolutions with batch norm and ReLU, the first and the last with stride 2."""
    layers: list[nn.Module] = []
    for (dim, out_dim), stride in zip(pairwise([in_channels, *dims, dims[-1]]), (2, 1, 1, 2), strict=True):
        layers += [nn.Conv2d(dim, out_dim, 3, stride, 1, bias=False), nn.BatchNorm2d(out_dim), nn.ReLU()]
    return ConvStem(*layers)


def init_weights(module: nn.Module) -> None:
    """Products and convolutions: truncated normal with standard deviation 0.02 and zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
