"""ResNet: residual blocks of convolutions, in some of which a mixer of tokens has the place of the 3×3 convolution.

Source: Deep Residual Learning for Image Recognition, He et al., CVPR 2016, arXiv:1512.03385, table 1. Mixers in it:
BoTNet, arXiv:2101.11605; HaloNet, arXiv:2103.12731; LambdaNetworks, arXiv:2102.08602. The "tiered" stem is timm's.
Shapes: B = batch, N = H·W tokens, C = channels, H W = map.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from conf.values import is_whole
from models.attention import AttentionFactory, Grid, Mixer, Site, build
from models.backbones.base import Backbone, check_counts, pair
from models.backbones.classifier import classifier, init_weights
from models.backbones.hierarchical import check_lists
from models.layers.block import Stage, drop_path_rates
from models.layers.patch_embed import cells
from models.layers.residual_block import ConvNorm, LastConv, ResidualBlock
from models.layers.tokens import to_tokens

ACTS = {"relu": nn.ReLU, "silu": nn.SiLU}
STEMS = {"7x7": ((7, 1),), "tiered": ((3, 3 / 8), (3, 1 / 2), (3, 1))}  # kernels, and shares of the channels
Blocks = Sequence[str | Sequence[int]]


class ResNet(Backbone):
    """A stem with stride 4, then stages that halve the map in their first block, but not the first one; mean, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage; None for convolutions alone.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        dims, depths: channels and blocks of each stage.
        num_heads: of the mixers of each stage.
        attention_blocks: of each stage the numbers of the blocks that have a mixer, from 0, or "all".
        basic: blocks of two 3×3 convolutions in the place of bottlenecks.
        widths: channels inside of the bottlenecks of each stage; None for a quarter of `dims`.
        stem: "7x7", or "tiered" for three 3×3 convolutions, both with max pooling behind them.
        stem_dim: channels of the stem.
        last_dim: channels of a 1×1 convolution behind the last stage, as in the larger HaloNets; None for none.
        act: "relu" or "silu".
        branch_gate: factory of the gate at the end of every branch where no other `gate` is chosen; None for none.
        drop_path, layer_scale: see `ResidualBlock`; drop path grows linearly over the blocks.
        in_channels: of the images.

    Raises:
        ValueError: lists of unequal length, an unknown stem or activation, or blocks that are not there.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None] | None,
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        attention_blocks: Blocks,
        basic: bool = False,
        widths: Sequence[int] | None = None,
        stem: str = "7x7",
        stem_dim: int = 64,
        last_dim: int | None = None,
        act: str = "relu",
        branch_gate: Callable[[Site], nn.Module] | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        for name, value, known in (("stem", stem, STEMS), ("act", act, ACTS)):
            values.choice("ResNet", name, value, known, fix=f"set model.{name}")
        check_counts("ResNet", stem_dim=stem_dim, last_dim=1 if last_dim is None else last_dim)
        values.flag("ResNet", "basic", basic, fix="set model.basic=true or false")
        if basic and widths is not None:
            raise UserError(f"ResNet: basic blocks have no widths of their own, got {widths}; set model.widths=null")
        inner = list(dims if basic else widths or [max(dim // 4, 1) for dim in dims])
        check_lists("ResNet", dims=dims, depths=depths, num_heads=num_heads, widths=inner)
        placed = places(attention_blocks, depths)
        self.basic, self.channels, self.strides = basic, list(dims), [4 << s for s in range(len(dims))]
        self.pixels = pair(image_size)
        self.grids = [Grid(*cells(self.pixels, stride)) for stride in self.strides]
        sites = [
            self._site(s, b, depths[s], inner[s], num_heads[s]) for s in range(len(dims)) for b in range(depths[s])
        ]
        mixers = _mixers(attention, [site for site in sites if site.block in placed[site.stage]])
        rates = drop_path_rates(drop_path, len(sites))
        shared = {"act": ACTS[act], "layer_scale": layer_scale}
        blocks = [
            self._block(site, stem_dim, mixers.get(site), rate, **shared)
            for site, rate in zip(sites, rates, strict=True)
        ]
        self.stem, self.branch_gate = ResNetStem(in_channels, stem_dim, STEMS[stem], ACTS[act]), branch_gate
        starts = list(accumulate(depths, initial=0))
        self.stages = nn.ModuleList(Stage(blocks[a:b]) for a, b in pairwise(starts))
        if last_dim is not None:
            self.stages[-1].blocks.append(LastConv(dims[-1], last_dim, ACTS[act]))
            self.channels[-1] = last_dim
        self.norm, self.head = nn.Identity(), classifier(self.channels[-1], num_classes)
        self.apply(init_weights)

    def _site(self, s: int, block: int, depth: int, dim: int, num_heads: int) -> Site:
        """The place of a mixer in a block: in a bottleneck that halves the map, on the map in front of it."""
        halves = bool(s) and not block and not self.basic
        grid = self.grids[s - 1] if halves else self.grids[s]
        stride = 2 if halves else 1
        return Site(dim, num_heads, grid, s, block, depth, "convnet", image_size=self.pixels, stride=stride)

    def _block(self, site: Site, stem_dim: int, mixer: nn.Module | None, rate: float, **shared: Any) -> ResidualBlock:
        s, first = site.stage, not site.block
        dim = self.channels[s]
        before = dim if not first else self.channels[s - 1] if s else stem_dim
        ends = site._replace(dim=dim, grid=self.grids[s], stride=1)
        width = None if self.basic else site.dim
        own = {"width": width, "stride": 2 if s and first else 1, "drop_path": rate, "gate_site": ends}
        return ResidualBlock(before, dim, mixer=mixer, **own, **shared)


class ResNetStem(nn.Module):
    """Convolutions with norm and activation, the first with stride 2, and max pooling."""

    def __init__(self, in_channels: int, dim: int, layers: Sequence[tuple[int, float]], act: type[nn.Module]) -> None:
        super().__init__()
        self.depth = len(layers)
        for i, (kernel, share) in enumerate(layers):
            out = max(int(dim * share), 1)
            self.add_module(f"conv{i + 1}", ConvNorm(in_channels, out, kernel, stride=1 if i else 2))
            self.add_module(f"act{i + 1}", act())
            in_channels = out

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x_BCHW = images
        for i in range(self.depth):
            x_BCHW = self.get_submodule(f"act{i + 1}")(self.get_submodule(f"conv{i + 1}")(x_BCHW))
        x_BCHW = F.max_pool2d(x_BCHW, 3, stride=2, padding=1)
        return to_tokens(x_BCHW), Grid(*x_BCHW.shape[-2:])


def places(blocks: Blocks, depths: Sequence[int]) -> list[set[int]]:
    """The numbers of the blocks of each stage that have a mixer.

    Raises:
        ValueError: no list with one entry per stage, or a block that is not there.
    """
    fix = "set model.attention_blocks, e.g. [[], [], [1], all]"
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or len(blocks) != len(depths):
        raise UserError(
            f"ResNet: attention_blocks must have one entry for each of the {len(depths)} stages, got {blocks!r}; {fix}"
        )
    found = []
    for s, (entry, depth) in enumerate(zip(blocks, depths, strict=True)):
        numbers = range(depth) if entry == "all" else entry
        if isinstance(numbers, str | int) or not all(is_whole(b, 0) and b < depth for b in numbers):
            raise UserError(
                f"ResNet: attention_blocks of stage {s} must be all, or some of its blocks 0 to {depth - 1}, "
                f"got {entry!r}; {fix}"
            )
        found.append(set(numbers))
    return found


def _mixers(attention: AttentionFactory | Sequence[AttentionFactory] | None, sites: list[Site]) -> dict[Site, Mixer]:
    """The mixer of each site; {} for a ResNet of convolutions alone.

    Raises:
        ValueError: a mechanism without a place, and what `models.attention.build` refuses.
    """
    if attention is None:
        return {}
    if not sites:
        raise UserError(
            "ResNet: a mechanism was chosen and no block has a place for it, got attention_blocks without any; "
            "set model.attention_blocks, or attention=none"
        )
    last = max(site.stage for site in sites)
    given = attention[: last + 1] if isinstance(attention, Sequence) else attention
    return dict(zip(sites, build(given, sites), strict=True))
