"""PVT v2: four stages of overlapping patch embeddings and MLPs with a convolution; shortened keys or any other mixing.

Source: PVT v2: Improved Baselines with Pyramid Vision Transformer, Wang et al., CVMJ 2022, arXiv:2106.13797, sections
3.2 and 3.3 and table 1. As in the authors' code every stage ends with a norm, whose output goes on to the next one. The
keys shortened by 8, 4, 2 and 1 are the attention `spatial_reduction`; without position tables any image runs.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.attention import AttentionFactory, Grid
from models.backbones.base import Backbone, PatchStem, check_counts, classifier, init_weights
from models.backbones.stages import check_lists, sites_of, stages_of
from models.layers.block import Block, Stage
from models.layers.downsample import ConvDownsample
from models.layers.mbconv import init_convolutions
from models.layers.patch_embed import PatchEmbed

EPS = 1e-6  # of the norms of blocks and stages
PATCH_EPS = 1e-5  # of the norms of patch embeddings


class PVTv2(Backbone):
    """Overlapping patches, then stages that each halve the map and end with a norm; mean, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage; PVT v2's own is `spatial_reduction`.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        patch_size: stride S of the first embedding in pixels; its kernel has 2·S - 1, as those between stages (S = 2).
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads, and hidden over outer channels of each stage.
        drop_path, layer_scale: see `Block`; drop path grows linearly over the blocks.

    Raises:
        ValueError: lists of unequal length or with entries below 1.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        patch_size: int = 4,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("PVTv2", patch_size=patch_size)
        check_lists("PVTv2", dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        self.channels, self.strides = list(dims), [patch_size << s for s in range(len(dims))]
        shape = {"strides": self.strides, "dims": dims, "depths": depths, "num_heads": num_heads}
        options = {"mlp_kernel": 3, "layer_scale": layer_scale, "norm_eps": EPS}
        self.stages = stages_of(
            attention,
            sites_of("hierarchical", image_size, **shape),
            drop_path,
            block=lambda site, mixer, rate: Block(
                site.dim, mixer, mlp_ratio=mlp_ratios[site.stage], drop_path=rate, **options
            ),
            between=lambda s: ConvDownsample(
                dims[s - 1], dims[s], kernel_size=3, out_norm=nn.LayerNorm(dims[s], eps=PATCH_EPS)
            ),
            stage=NormedStage,
        )
        window = {"kernel_size": 2 * patch_size - 1, "padding": patch_size - 1}
        norm = nn.LayerNorm(dims[0], eps=PATCH_EPS)
        self.stem = PatchStem(PatchEmbed(in_channels, dims[0], patch_size, **window, norm=norm))
        self.norm = nn.Identity()
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)
        init_convolutions(self)


class NormedStage(Stage):
    """A stage that ends with a LayerNorm: the pyramids have its output."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__(blocks, downsample)
        self.norm = nn.LayerNorm(blocks[-1].norm1.normalized_shape, eps=EPS)

    def forward(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid, list[dict[str, Tensor]]]:
        x, grid, losses = super().forward(x_BNC, grid)
        return self.norm(x), grid, losses
