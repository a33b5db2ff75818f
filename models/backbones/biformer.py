"""BiFormer: four stages of blocks with a convolutional position encoding, and bi-level routing or any other mixing.

Source: BiFormer, Zhu et al., CVPR 2023, arXiv:2303.08810, section 3.3 and figure 3; the layout of Swin-T with the same
attention (STL, table 6 of the paper) is the same class with `layout="swin"`. Batch norm stands behind the convolutions,
and before the pooling.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from conf.errors import UserError
from models.attention import AttentionFactory, Grid
from models.backbones.base import Backbone, PatchStem, classifier, init_weights
from models.backbones.stages import check_lists, sites_of, stages_of
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.norm import TokenBatchNorm
from models.layers.patch_embed import PatchEmbed
from models.layers.position import ConvPosition
from models.layers.tokens import to_tokens

LAYOUTS = ("biformer", "swin")
EPS = 1e-6  # of every LayerNorm


class BiFormer(Backbone):
    """Overlapping convolutions from stage to stage; position, attention and MLP in every block; batch norm, mean, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage; BiFormer's own is `biformer`.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        dims, depths, num_heads: channels, blocks and heads of each stage; the authors have 8 heads in the last one.
        layout: "biformer", or "swin": patches of 4×4 pixels, batch norm in front of 2×2 convolutions between the
            stages, and no position encoding.
        drop_path, layer_scale, mlp_ratio: see `Block`; drop path grows linearly over the blocks.

    Raises:
        ValueError: lists of unequal length or with entries below 1, or an unknown layout.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        layout: str = "biformer",
        mlp_ratio: float = 3.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_lists("BiFormer", dims=dims, depths=depths, num_heads=num_heads)
        if layout not in LAYOUTS:
            raise UserError(f"BiFormer: layout must be {' or '.join(LAYOUTS)}, got {layout!r}; set model.layout")
        overlapping = layout == "biformer"
        self.channels, self.strides = list(dims), [4 << s for s in range(len(dims))]
        shape = {"strides": self.strides, "dims": dims, "depths": depths, "num_heads": num_heads}
        options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale, "norm_eps": EPS}
        stages = stages_of(
            attention,
            sites_of("hierarchical", image_size, **shape, positioned=overlapping),
            drop_path,
            block=lambda site, mixer, rate: _block(site.dim, mixer, overlapping, drop_path=rate, **options),
            between=lambda s: _downsample(dims[s - 1], dims[s], overlapping),
        )
        self.stem = Stem(in_channels, dims[0]) if overlapping else _patches(in_channels, dims[0])
        self.stages = stages
        self.norm = TokenBatchNorm(dims[-1])
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)

    def level_norm(self, dim: int) -> nn.Module:
        """LayerNorm over the channels, as in the authors' detection and segmentation backbones."""
        return nn.LayerNorm(dim, eps=EPS)


class Stem(nn.Module):
    """Two 3×3 convolutions with stride 2, each with batch norm: (B, channels, height, width) → (B, N, C), map."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x_BCHW = self.conv(images)
        return to_tokens(x_BCHW), Grid(*x_BCHW.shape[-2:])


def _block(dim: int, mixer: nn.Module, overlapping: bool, **options) -> Block:
    return Block(dim, mixer, position=ConvPosition(dim) if overlapping else None, **options)


def _patches(in_channels: int, dim: int) -> PatchStem:
    return PatchStem(PatchEmbed(in_channels, dim, 4, norm=TokenBatchNorm(dim)))


def _downsample(dim: int, out_dim: int, overlapping: bool) -> ConvDownsample:
    if overlapping:
        return ConvDownsample(dim, out_dim, kernel_size=3, out_norm=TokenBatchNorm(out_dim))
    return ConvDownsample(dim, out_dim, norm=TokenBatchNorm(dim))
