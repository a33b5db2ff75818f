"""ConvNeXt: four stages of large depth-wise convolutions, some of them replaced by injected attention.

Source: A ConvNet for the 2020s, Liu et al., CVPR 2022, arXiv:2201.03545; sizes: section 3.
With `attention=conv` this is ConvNeXt itself. A stage with any other attention is made of transformer blocks
(x + attention(norm(x)), then x + mlp(norm(x))) rather than of x + mlp(norm(mix(x))): attention needs normalised tokens,
and, unlike the centre of a kernel, it does not carry a token's own value on to the MLP.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.attention import AttentionFactory, Grid
from models.backbones.base import Backbone, PatchStem, check_counts, classifier, init_weights
from models.backbones.stages import check_lists, heads_of, per_stage, sites_of, stages_of
from models.layers.block import Block
from models.layers.convnext_block import ConvNeXtBlock
from models.layers.downsample import ConvDownsample
from models.layers.patch_embed import PatchEmbed


class ConvNeXt(Backbone):
    """Patches, then stages with a strided convolution between them, mean pooling, norm, head.

    Args:
        attention: factory of the token mixers; a list has one entry per stage, None for those without attention.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        convolution: factory of the token mixers in the other stages, as in conf/attention/conv.yaml.
        attention_stages: the stages that get `attention`, 0-based.
        patch_size: side of a patch in pixels.
        dims, depths: channels and blocks of each stage.
        head_dim: channels per head.
        drop_path, layer_scale, mlp_ratio: see `Block`; drop path grows linearly over the blocks.

    Raises:
        ValueError: lists of unequal length or with entries below 1, or an attention stage that is not there.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        convolution: AttentionFactory,
        attention_stages: Sequence[int] = (2, 3),
        patch_size: int = 4,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-6,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("ConvNeXt", patch_size=patch_size, head_dim=head_dim)
        check_lists("ConvNeXt", dims=dims, depths=depths)
        factories = [f or convolution for f in per_stage("ConvNeXt", attention, attention_stages, len(dims))]
        self.channels, self.strides = list(dims), [patch_size << s for s in range(len(dims))]
        heads = [heads_of("ConvNeXt", dim, head_dim) for dim in dims]
        shape = {"strides": self.strides, "dims": dims, "depths": depths, "num_heads": heads}
        options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
        stages = stages_of(
            factories,
            sites_of("convnet", image_size, **shape),
            drop_path,
            block=lambda site, mixer, rate: residual(site.dim, mixer, drop_path=rate, **options),
            between=lambda s: downsample(dims[s - 1], dims[s]),
        )
        self.stem = PatchStem(PatchEmbed(in_channels, dims[0], patch_size, norm=nn.LayerNorm(dims[0], eps=1e-6)))
        self.stages = stages
        self.norm = nn.Identity()
        self.head_norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)

    def pool(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) → (B, C): the mean over the map, then the norm."""
        return self.head_norm(x_BNC.mean(1))


def downsample(dim: int, out_dim: int) -> ConvDownsample:
    """ConvNeXt's, with its initial weights."""
    module = ConvDownsample(dim, out_dim, norm=nn.LayerNorm(dim, eps=1e-6))
    nn.init.trunc_normal_(module.conv.weight, std=0.02)
    nn.init.zeros_(module.conv.bias)
    return module


def residual(dim: int, mixer: nn.Module, **options) -> nn.Module:
    """The block that suits a mixer: ConvNeXt's for those that say `prenorm = False`, a transformer's for others."""
    return (Block if getattr(mixer, "prenorm", True) else ConvNeXtBlock)(dim, mixer, **options)
