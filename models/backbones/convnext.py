"""ConvNeXt: four stages of large depth-wise convolutions, some of them replaced by injected attention.

Source: A ConvNet for the 2020s, Liu et al., CVPR 2022, arXiv:2201.03545; sizes: section 3.
With `attention=conv` this is ConvNeXt itself. A stage with any other attention is made of transformer blocks
(x + attention(norm(x)), then x + mlp(norm(x))) rather than of x + mlp(norm(mix(x))): attention needs normalised tokens,
and, unlike the centre of a kernel, it does not carry a token's own value on to the MLP.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.attention import AttentionFactory, Site
from models.backbones.base import check_counts
from models.backbones.hierarchical import Hierarchical
from models.backbones.stages import per_stage, whole_heads
from models.layers.convnext_block import ConvNeXtBlock
from models.layers.downsample import ConvDownsample


class ConvNeXt(Hierarchical):
    """Patches, then stages with a strided convolution between them, mean pooling, norm, head.

    Args:
        attention: factory of the token mixers; a list has one entry per stage, None for those without attention.
        convolution: factory of the token mixers in the other stages, as in conf/attention/conv.yaml.
        attention_stages: the stages that get `attention`, 0-based.
        head_dim: channels per head.
        args, dims, options: see `Hierarchical`.

    Raises:
        ValueError: an attention stage that is not there, and what `Hierarchical` refuses.
    """

    kind = "convnet"
    patch_eps, norm_eps = 1e-6, 1e-6
    norm_pooled = True

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory | None],
        *args: Any,
        dims: Sequence[int],
        convolution: AttentionFactory,
        attention_stages: Sequence[int] = (2, 3),
        head_dim: int = 32,
        **options: Any,
    ) -> None:
        check_counts("ConvNeXt", head_dim=head_dim)
        mixers = [f or convolution for f in per_stage("ConvNeXt", attention, attention_stages, len(dims))]
        heads = [whole_heads("ConvNeXt", dim, head_dim) for dim in dims]
        super().__init__(mixers, *args, dims=dims, num_heads=heads, **options)

    def block(self, site: Site, mixer: nn.Module, rate: float) -> nn.Module:
        """That which suits the mixer: ConvNeXt's for those that say `residual = False`, a transformer's for others."""
        if mixer.residual:
            return super().block(site, mixer, rate)
        shared = {"mlp_ratio": self.mlp_ratios[site.stage], "layer_scale": self.layer_scale}
        return ConvNeXtBlock(site.dim, mixer, drop_path=rate, **shared)

    def between(self, s: int) -> ConvDownsample:
        dim, out_dim = self.channels[s - 1 : s + 1]
        module = ConvDownsample(dim, out_dim, norm=nn.LayerNorm(dim, eps=self.patch_eps))
        nn.init.trunc_normal_(module.conv.weight, std=0.02)
        nn.init.zeros_(module.conv.bias)
        return module
