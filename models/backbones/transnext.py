"""TransNeXt: four stages of overlapping patch embeddings and convolutional GLUs; aggregated attention or any other.

Source: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, sections 3.4 and 3.5 and table 1. The layout is that of PVT v2:
every stage ends with a norm, whose output goes on to the next one. Its attention is `aggregated`, and positions are in
the biases of the attention and in the convolutions. The authors' code runs only images of the size it was built for;
here any image runs.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.attention import AttentionFactory, Site
from models.backbones.base import pair
from models.backbones.pvt_v2 import PVTv2
from models.layers.block import Block
from models.layers.mlp import ConvGLU


class TransNeXt(PVTv2):
    """PVT v2 whose MLPs are convolutional GLUs, which take two thirds of `mlp_ratios`.

    Args:
        pretrain_size: pixels of the images that the weights were trained on first, one number or (height, width): the
            biases of an attention that measures distances (`aggregated`, `cosine`) do so in the maps of these,
            so that the same weights are the same function whatever `image_size` is. None for image_size.
        attention, image_size, num_classes, options: see `Hierarchical` and `PVTv2`.

    Raises:
        ValueError: sizes that are no pixels, an attention with a `pretrain_size` of its own, and what `Hierarchical`
            refuses.
    """

    undecayed = ("query_embedding", "relative_pos_bias_local", "temperature", "cpb_fc1.weight", "cpb_fc2.weight")

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        image_size: int | Sequence[int],
        num_classes: int,
        *,
        pretrain_size: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        self.trained_on = pair(image_size) if pretrain_size is None else pair(pretrain_size, "pretrain_size")
        super().__init__(attention, image_size, num_classes, **options)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        block = super().block(site, mixer, rate)
        block.mlp = ConvGLU(site.dim, int(site.dim * self.mlp_ratios[site.stage]))
        return block
