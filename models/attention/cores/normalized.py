"""Normalised attention as published: weights with a learned mean and deviation, and a norm and GELU behind the heads.

Source: Normalized Attention Without Probability Cage, Richter & Wattenhofer, 2020, arXiv:2005.09561, equation 5 and the
released block: heads → LayerNorm over all of them → GELU → projection. Without the two it is
`attention=softmax attention/weights=normalized`.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head, C = M·D.
The released block also has LayerNorm behind the projection, which is the backbone's here; its GELU is the tanh form.
"""

from typing import Unpack

from torch import Tensor, nn

from conf import values
from kernels.heads import merge_heads
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.options import check_flags
from models.attention.softmax import SoftmaxCore, check_tokens
from models.attention.weights.normalized import NormalizedWeights


def normalized_attention(
    site: Site,
    *,
    hidden_norm: bool = True,
    hidden_gelu: bool = True,
    max_tokens: int = 4096,
    **composition: Unpack[Composition],
) -> Mixer:
    """Normalised weights, norm, GELU.

    Args:
        site: the place in the backbone.
        hidden_norm: LayerNorm over the channels of all heads.
        hidden_gelu: GELU behind it.
        max_tokens: most tokens of a group whose weights are written out.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        Refused: a group of more than `max_tokens`.
    """
    check_flags("normalized", hidden_norm=hidden_norm, hidden_gelu=hidden_gelu)
    values.whole("normalized", "max_tokens", max_tokens, fix="set attention.max_tokens")
    dim = head_channels(site)

    def core(num_heads: int, grid: Grid, kv_grid: Grid) -> NormalizedCore:
        check_tokens(grid, kv_grid, explicit=True, most=max_tokens)
        return NormalizedCore(num_heads, dim, hidden_norm, hidden_gelu, max_tokens)

    return assemble(site, core, **composition)


class NormalizedCore(SoftmaxCore):
    """See the module's docstring; arguments as of `normalized_attention`."""

    def __init__(self, num_heads: int, head_dim: int, norm: bool, gelu: bool, max_tokens: int) -> None:
        super().__init__(num_heads, head_dim, weights=NormalizedWeights(num_heads, head_dim), max_tokens=max_tokens)
        self.norm = nn.LayerNorm(num_heads * head_dim, eps=1e-3) if norm else nn.Identity()
        self.gelu = nn.GELU("tanh") if gelu else nn.Identity()

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid, **given) -> Tensor:
        return self.finished(super().forward(q_BMND, k_BMSD, v_BMSD, grid, kv_grid, **given))

    def finished(self, o_BMND: Tensor) -> Tensor:
        """Norm and GELU behind the weighted values."""
        return self.gelu(self.norm(merge_heads(o_BMND))).unflatten(2, (o_BMND.shape[1], -1)).transpose(1, 2)
