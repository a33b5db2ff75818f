"""NiNformer: patches, equal blocks whose two branches share a norm, the mean over the map, and a Linear.

Source: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function, Abdullah & Aydin, 2024,
arXiv:2403.02411, and the authors' code, github.com/Abdullah-88/NiNformer. A block is x + mix(norm(x)), then
x + mlp(norm(x)) with the same norm; its mixing is `nin_gate`, which knows tokens by their places, so that there is no
position table. No norm stands in front of the head. The dropout of the code's MLPs is left out.
Shapes: B = batch, N = H·W tokens, C = channels.
"""

from typing import Any

from torch import nn

from models.attention import Grid, Site
from models.backbones.plain import Plain
from models.layers.block import Block
from models.layers.patch_embed import PatchEmbed
from models.layers.stem import PatchStem


class NiNformer(Plain):
    """Patches, `depth` equal blocks with one norm each, the mean over the map, head.

    Args:
        patch_size, mlp_ratio: see `Plain`.
        args, options: see `Plain`.
    """

    norm_eps = 1e-5

    def __init__(self, *args: Any, patch_size: int = 4, mlp_ratio: float = 2.0, **options: Any) -> None:
        super().__init__(*args, patch_size=patch_size, mlp_ratio=mlp_ratio, **options)

    def stem_of(self, in_channels: int, dim: int, patch_size: int, grid: Grid) -> PatchStem:
        return PatchStem(PatchEmbed(in_channels, dim, patch_size))

    def block(self, site: Site, mixer: nn.Module, rate: float) -> Block:
        return super().block(site, mixer, rate, shared_norm=True)

    def norm_of(self, dim: int) -> nn.Identity:
        return nn.Identity()
