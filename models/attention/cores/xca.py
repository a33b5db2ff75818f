"""Cross-covariance attention: channels of a head attend to one another, by the cosine of their queries and keys.

Source: XCiT: Cross-Covariance Image Transformers, El-Nouby et al., NeurIPS 2021, arXiv:2106.09681, section 3.2. With
every channel of queries and keys a vector over the N tokens, of length 1,
    o = v Aᵀ,   A = softmax(q̂ᵀ k̂ τ),   one τ per head
Shapes: B = batch, N = tokens, M = heads, D = channels per head.
It is DaViT's channel attention with the lengths of the channels divided out and a learned temperature. Tokens see of
one another only what the covariance sums up, so there is no matrix of tokens.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from kernels.cross_covariance import cross_covariance
from kernels.cross_covariance import definition as channel_heads
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Runs, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME
from models.attention.contract.options import check_whole
from models.attention.multihead import Core


def xca_attention(site: Site, *, head_dim: int | None = None, **composition: Unpack[Composition]) -> Mixer:
    """Attention among channels: linear in tokens.

    Args:
        site: the place in the backbone.
        head_dim: channels per head D; C / M by default.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    check_whole("xca", head_dim=1 if head_dim is None else head_dim)
    dim = head_dim or head_channels(site)
    return assemble(site, lambda heads, *_: CrossCovarianceCore(heads), head_dim=dim, **composition)


class CrossCovarianceCore(Core):
    """The covariance of the channels, its softmax, and its product with the values; in float32 at least."""

    keys = frozenset({SAME})  # its sums are over tokens that are queries and keys
    ignores_grid = True
    without_matrix = "the channels of a head attend to one another, not tokens"

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `Core`."""
        return Runs("cross_covariance", True)

    def fused(self, qkv_BNC: Tensor, grid: Grid, num_heads: int) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D); see `Core`."""
        return cross_covariance(qkv_BNC, self.temperature.flatten(), num_heads)

    def forward(self, q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        return channel_heads(q_BMND, k_BMND, v_BMND, self.temperature.flatten())
