"""Linear attention with ReLU features and a denominator that is held away from zero: L2ViT's global attention.

Source: The Linear Attention Resurrection in Vision Transformer, Zheng, 2025, arXiv:2501.16182, section 3:
    o = τ φ(q) φ(k)ᵀ v / max(φ(q) · Σ φ(k), 100),   φ = ReLU,   one τ per head
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head.
τ is learned and starts at D^-1/2, as in the authors' code; so a row of the weights sums to τ, or to less where the
denominator is below its least value, which at unit scale happens below about 20 tokens of 32 channels.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from conf import values
from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Site
from models.attention.contract.heads import head_channels
from models.attention.cores.stateful import State, StateCore


def linear_attention(site: Site, *, denominator_min: float = 100, **composition: Unpack[Composition]) -> Mixer:
    """ReLU linear attention with a clamped denominator.

    Args:
        site: the place in the backbone.
        denominator_min: what the denominator is at least; at least 1e-6. Paper: 100.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    values.number("linear", "denominator_min", denominator_min, 1e-6, fix="the paper uses 100")
    dim = head_channels(site)
    return assemble(site, lambda heads, *_: LinearCore(heads, dim, denominator_min), **composition)


class LinearCore(StateCore):
    """Features, the state φ(k)ᵀ v, and its reading by every query; in float32 at least."""

    ignores_grid = True

    def __init__(self, num_heads: int, head_dim: int, denominator_min: float = 100) -> None:
        super().__init__()
        self.denominator_min = denominator_min
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), head_dim**-0.5))

    def queried(self, q_BMND: Tensor, grid: Grid) -> Tensor:
        return wide(q_BMND).relu()

    def state(self, k_BMSD: Tensor, v_BMSD: Tensor, kv_grid: Grid) -> State:
        k = wide(k_BMSD).relu()
        return k.mT @ wide(v_BMSD), k.sum(2, keepdim=True)

    def read(self, q_BMND: Tensor, state: State, keys: int) -> Tensor:
        state_BMDD, k_BM1D = state
        return q_BMND @ (state_BMDD * self.temperature) / self._denominator(q_BMND, k_BM1D)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S): quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            q, k = wide(q_BMND).relu(), wide(k_BMSD).relu()
            return q @ k.mT * self.temperature / self._denominator(q, k.sum(2, keepdim=True))

    def _denominator(self, q_BMND: Tensor, k_BM1D: Tensor) -> Tensor:
        return (q_BMND @ k_BM1D.mT).clamp(min=self.denominator_min)
