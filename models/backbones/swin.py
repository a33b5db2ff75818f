"""Swin Transformer: four stages with patch merging between them; windows or any other injected token mixing.

Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, sections 3.1 and 3.3.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

from torch import nn

from models.attention import AttentionFactory
from models.backbones.base import Backbone, PatchStem, check_counts, classifier, init_weights
from models.backbones.stages import check_lists, sites_of, stages_of
from models.layers.block import Block
from models.layers.downsample import PatchMerging
from models.layers.patch_embed import PatchEmbed


class Swin(Backbone):
    """Patches, then stages that double the channels and halve the map; norm, mean pooling, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        patch_size: side of a patch in pixels.
        dims, depths, num_heads: channels, blocks and heads of each stage.
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
        patch_size: int = 4,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("Swin", patch_size=patch_size)
        check_lists("Swin", dims=dims, depths=depths, num_heads=num_heads)
        self.channels, self.strides = list(dims), [patch_size << s for s in range(len(dims))]
        shape = {"strides": self.strides, "dims": dims, "depths": depths, "num_heads": num_heads}
        options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale, "norm_eps": 1e-5}
        stages = stages_of(
            attention,
            sites_of("hierarchical", image_size, **shape),
            drop_path,
            block=lambda site, mixer, rate: Block(site.dim, mixer, drop_path=rate, **options),
            between=lambda s: PatchMerging(dims[s - 1], dims[s]),
        )
        self.stem = PatchStem(PatchEmbed(in_channels, dims[0], patch_size, norm=nn.LayerNorm(dims[0])))
        self.stages = stages
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5)
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)
