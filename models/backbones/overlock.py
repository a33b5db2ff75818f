"""OverLoCK: large kernels to an overview of the image, which then guides a second pass of dynamic kernels.

Source: OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels, Lou & Yu, CVPR 2025,
arXiv:2502.20087, section 3 and table 1; code: LMMMEng/OverLoCK at commit 2c8ab3b. The mixer of the second pass is
`contmix`, or any other; half of the layers, the gate and the large kernel beside it stay. Published parameters are
those of `deploy`, where branches are one kernel and the auxiliary classifier is gone.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.attention import AttentionFactory, Grid, Mixer, Site, build
from models.backbones.base import Backbone, check_counts, pair, stacked
from models.backbones.classifier import classifier
from models.backbones.hierarchical import check_lists
from models.backbones.stages import per_stage
from models.layers.block import Stage, drop_path_rates
from models.layers.dilated_reparam import DilatedReparam
from models.layers.norm import TokenBatchNorm
from models.layers.overlock_block import ContextBlock, ReparamBlock
from models.layers.overlock_stage import OVERVIEW, FocusStage, LastStage, TwoStreams, halving
from models.layers.patch_embed import cells
from models.layers.stem import ConvStem

SHARE = 4  # channels of the overview over those of its context


class OverLoCK(Backbone):
    """Stages of large kernels; the last two of them are looked at again, with mixers. A layer, mean, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage, None for all but the last two.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        dims, depths, kernels: of each stage, channels, blocks without a mixer and sides of the large kernels.
        focus_depths, num_heads: of the last two stages, blocks with a mixer and heads.
        mlp_ratio, focus_mlp_ratio: hidden over outer channels of the MLPs of blocks without and with a mixer.
        layer_scale: of the scales of the last two stages at first; None for no scales.
        scale_residual: see `models.layers.overlock_block.Scaled`.
        head_width: channels of the layer in front of the pooling.
        drop_path: grows linearly over all blocks.
        auxiliary: a classifier of the overview, for training alone.
        deploy: the form for inference, see `deployed`.
        in_channels: of the images.

    Raises:
        ValueError: lists of unequal length, fewer than two stages, or an overview whose channels have no quarter.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        kernels: Sequence[int],
        focus_depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        focus_mlp_ratio: float = 3.0,
        layer_scale: float | None = 1.0,
        scale_residual: bool = True,
        head_width: int = 1024,
        drop_path: float = 0.0,
        auxiliary: bool = True,
        deploy: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("OverLoCK", head_width=head_width)
        check_lists("OverLoCK", dims=dims, depths=depths, kernels=kernels)
        check_lists("OverLoCK", focus_depths=focus_depths, num_heads=num_heads)
        for name, flag in (("auxiliary", auxiliary), ("deploy", deploy), ("scale_residual", scale_residual)):
            values.flag("OverLoCK", name, flag, fix=f"set model.{name}=true or false")
        _check(dims, focus_depths)
        context = dims[-1] // SHARE
        self.strides = [4 << s for s in range(len(dims))]
        self.grids = [Grid(*cells(pair(image_size), stride)) for stride in self.strides]
        self.channels = [*dims[:-2], *(dim + context for dim in dims[-2:])]
        mixers = self._mixers(attention, dims, num_heads, focus_depths, pair(image_size))
        rates = iter(drop_path_rates(drop_path, sum(depths) + sum(focus_depths)))
        self.stem, shared = stem(in_channels, dims[0]), {"scale_residual": scale_residual, "deploy": deploy}
        scales = [None] * (len(dims) - 2) + [layer_scale] * 2
        base = []
        for s, (depth, kernel, scale) in enumerate(zip(depths, kernels, scales, strict=True)):
            own = shared | {"mlp_ratio": mlp_ratio, "layer_scale": scale}
            blocks = [ReparamBlock(dims[s], kernel, drop_path=rate, **own) for rate in islice(rates, depth)]
            base.append(Stage(blocks, halving(dims[s - 1], dims[s]) if s else None))
        shared |= {"mlp_ratio": focus_mlp_ratio, "layer_scale": layer_scale}
        first, last = (_focus(of_stage, kernels[k - 2], rates, shared, k == 0) for k, of_stage in enumerate(mixers))
        focus = FocusStage(first, base[-2], base[-1], nn.Linear(dims[-1], context))
        self.stages = nn.ModuleList([*base[:-2], focus, LastStage(last, TwoStreams(*dims[-2:], context))])
        self.norm, self.head = Projection(self.channels[-1], head_width), classifier(head_width, num_classes)
        supervised = auxiliary and num_classes and not deploy
        self.aux_norm = TokenBatchNorm(dims[-1]) if supervised else None
        self.aux_head = classifier(dims[-1], num_classes) if supervised else None
        self.apply(init_weights)

    def _mixers(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        dims: Sequence[int],
        num_heads: Sequence[int],
        depths: Sequence[int],
        pixels: tuple[int, int],
    ) -> list[list[Mixer]]:
        """Those of the last two stages."""
        last = [len(dims) - 2, len(dims) - 1]
        given = {"positioned": True, "image_size": pixels, "context": dims[-1] // SHARE}
        sites = [
            Site(dims[s], num_heads[k], self.grids[s], s, block, depths[k], "hybrid", **given)
            for k, s in enumerate(last)
            for block in range(depths[k])
        ]
        mixers = build(per_stage("OverLoCK", attention, last, len(dims)), sites)
        return [mixers[: depths[0]], mixers[depths[0] :]]

    @property
    def pooled_dim(self) -> int:
        """Of the layer in front of the pooling."""
        return self.norm.fc.out_features

    def forward_supervised(
        self, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Logits and losses as `forward` gives them, and the logits of the auxiliary classifier."""
        maps, losses, carry = self._through_stages(images)
        logits, of_pool = self.classify_with_losses(*self.finished(*maps[-1]), labels)
        overview, _ = carry[OVERVIEW]
        return logits, stacked(losses) | of_pool, self.aux_head(self.aux_norm(overview).mean(1))

    def level_norm(self, dim: int) -> nn.Module:
        """LayerNorm, as in the authors' detection and segmentation backbones."""
        return nn.LayerNorm(dim, eps=1e-6)

    def deploy(self) -> "OverLoCK":
        """Makes it what it is with `deploy`, which computes the same in evaluation, for good; gives it back."""
        self.eval()
        for module in self.modules():
            if isinstance(module, DilatedReparam):
                module.deploy()
        self.aux_norm = self.aux_head = None
        return self

    def group_matcher(self, coarse: bool = False) -> dict:
        """Base blocks and those of the overview come before the others of their stage."""
        groups = super().group_matcher(coarse)
        if not coarse:
            s = len(self.stages) - 2
            parts = [("base", -2000), ("overview", -1000)]
            before = [
                (rf"^stages\.({s})\.{part}\.blocks\.{block}\.", (first + block,))
                for part, first in parts
                for block in range(len(getattr(self.stages[s], part).blocks))
            ]
            entries = [(rf"^stages\.({s})\.{part}\.downsample", (first,)) for part, first in parts]
            groups["blocks"] = [*entries, *before, (rf"^stages\.({s})\.context", (0,)), *groups["blocks"]]
            groups["blocks"].append((r"^aux_", (99999,)))
        return groups


def _focus(
    mixers: list[Mixer], kernel: int, rates: Iterator[float], options: dict[str, Any], entry: bool
) -> list[ContextBlock]:
    """The blocks of one of the two stages with mixers; the very first is given the overview as its second stream."""
    places = zip(mixers, islice(rates, len(mixers)), strict=True)
    return [
        ContextBlock(mixer, kernel, drop_path=rate, first=entry and i == 0, **options)
        for i, (mixer, rate) in enumerate(places)
    ]


class Projection(nn.Module):
    """SiLU(BN(W x)) of every token."""

    FOLDS = (("fc", "norm"),)

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc, self.norm, self.act = nn.Linear(dim, out_dim, bias=False), TokenBatchNorm(out_dim), nn.SiLU()

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.act(self.norm(self.fc(x_BNC)))


def stem(in_channels: int, dim: int) -> ConvStem:
    """Four 3×3 convolutions, the first and the third with stride 2; batch norms, and GELU between them."""
    half, layers = dim // 2, []
    for width, out, stride in ((in_channels, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
        layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.GELU()]
    return ConvStem(*layers[:-1])


def init_weights(module: nn.Module) -> None:
    """Products and convolutions: truncated normal with standard deviation 0.02 and zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(dims: Sequence[int], focus_depths: Sequence[int]) -> None:
    if len(dims) < 2 or len(focus_depths) != 2:
        raise UserError(
            f"OverLoCK: the last two of its stages are looked at again, got {len(dims)} dims and "
            f"{len(focus_depths)} focus_depths; give at least two dims, and two focus_depths"
        )
    if dims[-1] % SHARE:
        raise UserError(
            f"OverLoCK: a quarter of the last channels are the context, got dims ending in {dims[-1]}; set model.dims "
            f"to end in a multiple of {SHARE}"
        )
