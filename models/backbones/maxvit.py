"""MaxViT: blocks of a convolution, attention in windows, and attention in a dilated grid; four stages of them.

Source: MaxViT: Multi-Axis Vision Transformer, Tu et al., ECCV 2022, arXiv:2204.01697, section 3 and table 1; what the
paper leaves open is that of google-research/maxvit at commit 70a4707: TensorFlow's padding, GELU by tanh, the norm,
the layer and the tanh in front of the classifier, and how weights start. Where an edge is odd, the mean over 2×2 cells
counts those of the map, as TensorFlow does; timm counts zeros too. The attention is `multi_axis`; maps that its windows
and grids do not divide are completed here, where both codes stop.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from models.backbones.base import check_counts
from models.backbones.classifier import init_weights
from models.backbones.hierarchical import Hierarchical, Slot, check_lists
from models.backbones.stages import whole_heads
from models.layers.block import Stage, drop_path_rates
from models.layers.mbconv import Form, MBConvBlock, MBConvDownsample, SameConv2d
from models.layers.stem import ConvStem

GELU = partial(nn.GELU, approximate="tanh")
FORM = Form(average=True, act=GELU, squeeze_act=nn.SiLU, norm_eps=1e-3, norm_momentum=0.01, same=True)


class MaxViT(Hierarchical):
    """A convolutional stem, then stages that each halve the map; norm of the mean, a layer with tanh, head.

    One of its blocks is three here, an MBConv and two transformer blocks, of which the first is a site with an even
    number and the second one with an odd number; the first MBConv of a stage halves the map.

    Args:
        stem_dim: channels of the stem, which has stride 2.
        depths: the paper's blocks of each stage.
        head_dim: channels per head.
        drop_path: see `Block`; one rate for the three parts of a block.
        args, dims, options: see `Hierarchical`.

    Raises:
        ValueError: channels that are not whole heads, and what `Hierarchical` refuses.
    """

    kind = "hybrid"
    only_patch_size = 4
    norm_pooled = True

    def __init__(
        self,
        *args: Any,
        dims: Sequence[int],
        depths: Sequence[int],
        stem_dim: int = 64,
        head_dim: int = 32,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        check_counts("MaxViT", stem_dim=stem_dim, head_dim=head_dim)
        check_lists("MaxViT", dims=dims, depths=depths)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.rates = [[next(rates) for _ in range(depth)] for depth in depths]
        self.before = [stem_dim, *dims[:-1]]
        heads = [whole_heads("MaxViT", dim, head_dim) for dim in dims]
        super().__init__(*args, dims=dims, depths=[2 * depth for depth in depths], num_heads=heads, **options)
        self.apply(init_convolution)

    def stage(self, s: int, places: list[Slot]) -> Stage:
        """Block after block its MBConv, the first of which stands between the stages, its windows and its grid."""
        blocks: list[nn.Module] = []
        for j, rate in enumerate(self.rates[s]):
            blocks += [MBConvBlock(self.channels[s], rate, FORM)] if j else []
            blocks += [self.block(place.site, place.mixer, rate) for place in places[2 * j : 2 * j + 2]]
        return Stage(blocks, self.between(s))

    def between(self, s: int) -> MBConvDownsample:
        return MBConvDownsample(self.before[s], self.channels[s], drop_path=self.rates[s][0], form=FORM)

    def block(self, site: Any, mixer: nn.Module, rate: float, **own: Any) -> nn.Module:
        """With the GELU of the authors' code in its MLP."""
        block = super().block(site, mixer, rate, **own)
        if block.mlp is not None:
            block.mlp.act = GELU()
        return block

    def stem_of(self, in_channels: int) -> ConvStem:
        """Two 3×3 convolutions, the first with stride 2."""
        dim = self.before[0]
        layers = SameConv2d(in_channels, dim), FORM.norm(dim), GELU(), nn.Conv2d(dim, dim, 3, padding=1)
        return ConvStem(*layers)

    def last_norm(self, dim: int) -> "PreLogits":
        return PreLogits(dim, self.norm_eps)


class PreLogits(nn.Module):
    """tanh(W norm(x) + b), on what pooling gives."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim, eps=eps), nn.Linear(dim, dim)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x)).tanh()


def init_convolution(module: nn.Module) -> None:
    """Normal weights with standard deviation 0.02 and zero bias, as those of linear layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
