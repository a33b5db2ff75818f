"""A reading of Terminator: blocks of hyper-kernels without residual sums, each of which reads the whole map.

Source: HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction, Zhang, 2024, arXiv:2401.17948.
There is no released code, and the abstract does not define the network; what it states is kept: large kernels that a
slow network makes of coordinates (`attention=hyper_kernel`, with its branches and bottleneck), full context in every
layer, and no residual learning. A block is GELU(mix(norm(x))).
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from torch import nn

from models.attention import Site
from models.backbones.hierarchical import Hierarchical
from models.layers.downsample import PatchMerging
from models.layers.plain_block import PlainBlock


class Terminator(Hierarchical):
    """Patches, then stages of blocks without residual sums; between two of them the map is halved; norm, mean, head.

    There are no MLPs, so `mlp_ratio` means nothing.
    """

    def block(self, site: Site, mixer: nn.Module, rate: float) -> PlainBlock:
        return PlainBlock(site.dim, mixer, drop_path=rate, layer_scale=self.layer_scale, norm_eps=self.norm_eps)

    def between(self, s: int) -> PatchMerging:
        return PatchMerging(*self.channels[s - 1 : s + 1])
