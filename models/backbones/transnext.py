"""TransNeXt: four stages of overlapping patch embeddings and convolutional GLUs; aggregated attention or any other.

Source: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, sections 3.4 and 3.5 and table 1. The layout is that of PVT v2:
every stage ends with a norm, whose output goes on to the next one. Its attention is `aggregated`, and positions are in
the biases of the attention and in the convolutions. The authors' code runs only images of the size it was built for;
here any image runs.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence

from torch import nn

from conf.errors import UserError
from models.attention import AttentionFactory, Site
from models.backbones.base import Backbone, PatchStem, check_counts, classifier, init_weights, pair
from models.backbones.pvt_v2 import EPS, PATCH_EPS, NormedStage
from models.backbones.stages import check_lists, sites_of, stages_of
from models.layers.block import Block
from models.layers.downsample import ConvDownsample
from models.layers.mbconv import init_convolutions
from models.layers.mlp import ConvGLU
from models.layers.patch_embed import PatchEmbed, cells


class TransNeXt(Backbone):
    """Overlapping patches, then stages that each halve the map and end with a norm; mean, head.

    Args:
        attention: factory of the token mixers, or a list with one per stage; TransNeXt's own is `aggregated`.
        image_size: pixels, one number or (height, width); a forward pass may bring any other size.
        num_classes: outputs of the head; 0 for none.
        pretrain_size: pixels of the images that the weights were trained on first, one number or (height, width): the
            biases of an attention that measures distances (`aggregated`, `cosine`) measure them in the maps of these,
            so that the same weights are the same function whatever `image_size` is. None for image_size.
        patch_size: stride S of the first embedding in pixels; its kernel has 2·S - 1, as those between stages (S = 2).
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads, and hidden over outer channels of each stage; the
            GLU takes two thirds of the ratio.
        drop_path, layer_scale: see `Block`; drop path grows linearly over the blocks.

    Raises:
        ValueError: lists of unequal length or with entries below 1, sizes that are no pixels, or an attention with a
            `pretrain_size` of its own.
    """

    undecayed = ("query_embedding", "relative_pos_bias_local", "temperature", "cpb_fc1.weight", "cpb_fc2.weight")

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        pretrain_size: int | Sequence[int] | None = None,
        patch_size: int = 4,
        dims: Sequence[int] = (72, 144, 288, 576),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_counts("TransNeXt", patch_size=patch_size)
        check_lists("TransNeXt", dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        self.channels, self.strides = list(dims), [patch_size << s for s in range(len(dims))]
        shape = {"strides": self.strides, "dims": dims, "depths": depths, "num_heads": num_heads}
        self.stages = stages_of(
            attention,
            sites_of("hierarchical", image_size, **shape),
            drop_path,
            block=lambda site, mixer, rate: GatedBlock(site, mixer, mlp_ratios[site.stage], rate, layer_scale),
            between=lambda s: ConvDownsample(
                dims[s - 1], dims[s], kernel_size=3, out_norm=nn.LayerNorm(dims[s], eps=PATCH_EPS)
            ),
            stage=NormedStage,
        )
        trained = pair(image_size) if pretrain_size is None else pair(pretrain_size, "pretrain_size")
        for stage, stride in zip(self.stages, self.strides, strict=True):
            for block in stage.blocks:
                measure_in(cells(trained, stride), block.attn)
        window = {"kernel_size": 2 * patch_size - 1, "padding": patch_size - 1}
        norm = nn.LayerNorm(dims[0], eps=PATCH_EPS)
        self.stem = PatchStem(PatchEmbed(in_channels, dims[0], patch_size, **window, norm=norm))
        self.norm = nn.Identity()
        self.head = classifier(dims[-1], num_classes)
        self.apply(init_weights)
        init_convolutions(self)


class GatedBlock(Block):
    """A block whose MLP is a convolutional GLU."""

    def __init__(
        self, site: Site, mixer: nn.Module, mlp_ratio: float, drop_path: float, layer_scale: float | None
    ) -> None:
        options = {"drop_path": drop_path, "layer_scale": layer_scale, "norm_eps": EPS}
        super().__init__(site.dim, mixer, mlp_ratio=mlp_ratio, mlp_kernel=3, **options)
        self.mlp = ConvGLU(site.dim, int(site.dim * mlp_ratio))


def measure_in(size: tuple[int, int], mixer: nn.Module) -> None:
    """Lets every bias of a mixer that has a `pretrain_size`, the sides of a map, measure in a map of this size.

    Raises:
        ValueError: the mechanism was given another one.
    """
    for module in mixer.modules():
        if hasattr(module, "pretrain_size"):
            if module.pretrain_size != tuple(mixer.site.grid[:2]):
                raise UserError(
                    f"TransNeXt: distances are measured as model.pretrain_size says, got {module.pretrain_size} from "
                    "the attention; set attention.pretrain_size=null"
                )
            module.pretrain_size = size
