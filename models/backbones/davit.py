"""DaViT: pairs of a window block and a channel block, or any other injected token mixing, in four stages.

Source: DaViT: Dual Attention Vision Transformers, Ding et al., ECCV 2022, arXiv:2204.03645, sections 3.1 to 3.4. As in
the authors' code every block has a depth-wise convolution as position encoding in front of both its branches, and
drop path grows over all blocks, two per pair.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.attention import AttentionFactory, Grid
from models.backbones.base import Backbone, PatchStem, classifier, init_weights
from models.backbones.stages import check_lists, sites_of, stages_of
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.patch_embed import PatchEmbed
from models.layers.position import ConvPosition

EPS = 1e-5  # of every norm


class DaViT(Backbone):
    """A 7×7 convolution with stride 4, stages with LayerNorm and a 2×2 convolution between them, mean, norm, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage; DaViT's own is `dual`.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        dims, num_heads: channels, and heads (which are groups of channels in every second block) of each stage.
        depths: pairs of blocks of each stage.
        downsample_kernel: side of the convolution between stages; 3 overlaps.
        drop_path, layer_scale, mlp_ratio: see `Block`; drop path grows linearly over the blocks.

    Raises:
        ValueError: lists of unequal length or with entries below 1.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        downsample_kernel: int = 2,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_lists("DaViT", dims=dims, depths=depths, num_heads=num_heads)
        blocks = [2 * pairs for pairs in depths]
        self.channels, self.strides = list(dims), [4 << s for s in range(len(dims))]
        shape = {"strides": self.strides, "dims": dims, "depths": blocks, "num_heads": num_heads}
        options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
        stages = stages_of(
            attention,
            sites_of("hierarchical", image_size, **shape, positioned=True),
            drop_path,
            block=lambda site, mixer, rate: _block(site.dim, mixer, drop_path=rate, **options),
            between=lambda s: _downsample(dims[s - 1], dims[s], downsample_kernel),
        )
        norm = nn.LayerNorm(dims[0], eps=EPS)
        self.stem = PatchStem(PatchEmbed(in_channels, dims[0], 4, kernel_size=7, padding=3, norm=norm))
        self.stages = stages
        self.norm = nn.Identity()
        self.head_norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) → (B, C): the mean over the map, then the norm."""
        return self.head_norm(x_BNC.mean(1))

    def level_norm(self, dim: int) -> nn.Module:
        """LayerNorm, as in the authors' detection and segmentation backbones."""
        return nn.LayerNorm(dim, eps=EPS)


def _block(dim: int, mixer: nn.Module, **options) -> Block:
    return Block(dim, mixer, norm_eps=EPS, position=ConvPosition(dim), mlp_position=ConvPosition(dim), **options)


def _downsample(dim: int, out_dim: int, kernel_size: int) -> ConvDownsample:
    return ConvDownsample(dim, out_dim, kernel_size=kernel_size, norm=nn.LayerNorm(dim, eps=EPS))
