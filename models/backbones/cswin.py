"""CSWin Transformer: four stages with convolutions between them; cross-shaped windows or any other injected mixing.

Source: CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652, section 3.1 and table 1. The windows are the
attention `cswin`. As in the authors' code the first convolution has 7×7 pixels with stride 4 and 2 zeros around the
image, and norms stand behind the convolutions.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

from torch import nn

from models.attention import AttentionFactory
from models.backbones.base import Backbone, PatchStem, classifier, init_weights
from models.backbones.stages import check_lists, sites_of, stages_of
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.patch_embed import PatchEmbed

EPS = 1e-5  # of every norm


class CSWin(Backbone):
    """A 7×7 convolution with stride 4, stages with a strided 3×3 convolution between them, norm, mean, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage; CSWin's own is `cswin`.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
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
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_lists("CSWin", dims=dims, depths=depths, num_heads=num_heads)
        self.channels, self.strides = list(dims), [4 << s for s in range(len(dims))]
        shape = {"strides": self.strides, "dims": dims, "depths": depths, "num_heads": num_heads}
        options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale, "norm_eps": EPS}
        self.stages = stages_of(
            attention,
            sites_of("hierarchical", image_size, **shape),
            drop_path,
            block=lambda site, mixer, rate: Block(site.dim, mixer, drop_path=rate, **options),
            between=lambda s: ConvDownsample(
                dims[s - 1], dims[s], kernel_size=3, out_norm=nn.LayerNorm(dims[s], eps=EPS)
            ),
        )
        norm = nn.LayerNorm(dims[0], eps=EPS)
        self.stem = PatchStem(PatchEmbed(in_channels, dims[0], 4, kernel_size=7, padding=2, norm=norm))
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)
