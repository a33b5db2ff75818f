"""Efficient attention: queries softmax over channels, keys over tokens, so that keys and values meet first.

Source: Efficient Attention: Attention with Linear Complexities, Shen et al., WACV 2021, arXiv:1812.01243:
    o = softmax_channels(q) (softmax_tokens(k)ᵀ v)
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head.
The authors' module adds its input to its output; here the block does that. Their widths of keys and of values may
differ; a mixer here has one `head_dim` for both.
"""

from typing import Unpack

from torch import Tensor

from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.options import check_whole
from models.attention.multihead import Core


def efficient_attention(site: Site, *, head_dim: int | None = None, **composition: Unpack[Composition]) -> Mixer:
    """Linear attention whose weights are all positive and sum to one.

    Args:
        site: the place in the backbone.
        head_dim: channels per head D; C / M by default.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    check_whole("efficient", head_dim=1 if head_dim is None else head_dim)
    dim = head_dim or head_channels(site)
    return assemble(site, lambda *_: EfficientCore(), head_dim=dim, **composition)


class EfficientCore(Core):
    """No parameters; in float32 at least."""

    row_stochastic = True
    ignores_grid = True

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            o_BMND = wide(q_BMND).softmax(-1) @ (wide(k_BMSD).softmax(2).mT @ wide(v_BMSD))
        return o_BMND.to(v_BMSD.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S): quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            return wide(q_BMND).softmax(-1) @ wide(k_BMSD).softmax(2).mT
