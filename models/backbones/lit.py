"""LIT: stages of MLPs, then stages with attention over the whole map; deformable convolutions halve it in between.

Source: Less is More: Pay Less Attention in Vision Transformers, Pan et al., AAAI 2022, arXiv:2105.14217, section 3 and
table 1; code: ziplab/LIT at commit 742e961, sizes S, M and B. Attention is `softmax` with the bias `relative`, whose
tables the code ties to one image size. Odd maps, which the code refuses, are completed.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.attention import AttentionFactory, Site
from models.backbones.hierarchical import Hierarchical
from models.backbones.stages import per_stage
from models.layers.deformable import DeformableDownsample
from models.layers.mlp_block import MlpBlock


class LIT(Hierarchical):
    """Patches, then stages that double the channels and halve the map; norm, mean, head.

    Args:
        attention: factory of the token mixers; a list has one entry per stage, None for those without attention.
        attention_stages: the stages with mixers, 0-based; blocks of the others are MLPs.
        args, dims, options: see `Hierarchical`.

    Raises:
        ValueError: stages that do not exist, and what `Hierarchical` refuses.
    """

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        *args: Any,
        dims: Sequence[int],
        attention_stages: Sequence[int] = (2, 3),
        **options: Any,
    ) -> None:
        mixers = per_stage("LIT", attention, attention_stages, len(dims))[: max(attention_stages) + 1]
        self.attention_stages = list(attention_stages)
        super().__init__(mixers, *args, dims=dims, **options)

    def block(self, site: Site, mixer: nn.Module | None, rate: float) -> nn.Module:
        if mixer is not None:
            return super().block(site, mixer, rate)
        shared = {"mlp_ratio": self.mlp_ratios[site.stage], "layer_scale": self.layer_scale, "norm_eps": self.norm_eps}
        return MlpBlock(site.dim, drop_path=rate, **shared)

    def between(self, s: int) -> DeformableDownsample:
        return DeformableDownsample(*self.channels[s - 1 : s + 1])
