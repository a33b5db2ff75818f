"""Attention without softmax, of Galerkin and of Fourier type: normalised keys and values, or queries and keys.

Source: Choose a Transformer: Fourier or Galerkin, Cao, NeurIPS 2021, arXiv:2105.14995. With a LayerNorm of
its own for every head and S keys,
    Galerkin:  o = q (LN(k)ᵀ LN(v)) / S,       Fourier:  o = LN(q) (LN(k)ᵀ v) / (√D S)
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head, P = coordinates: 2 or none.
The authors' code multiplies the Fourier type in the other order, quadratic in tokens; the result is the same. It has no
output projection unless positions are concatenated, here there always is one; and it drops half of the weights in
evaluation too (`F.dropout` without its arguments), which is left out as a fault. Its start of the projections, close to
0.01 I, is not taken over: backbones draw those of all mechanisms alike.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Refused, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import KEYS, SAME, SHORTENED
from models.attention.contract.options import check_flags
from models.attention.cores.stateful import State, StateCore
from models.attention.multihead import Core

COORDINATES = 2


def galerkin_attention(site: Site, *, positions: bool = False, **composition: Unpack[Composition]) -> Mixer:
    """A projection of the values on the span of the keys: linear in tokens.

    Args:
        site: the place in the backbone.
        positions: row and column of a token, from 0 to 1, are two more channels of queries, keys and values.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    return _attention(site, GalerkinCore, "galerkin", positions, composition)


def fourier_attention(site: Site, *, positions: bool = False, **composition: Unpack[Composition]) -> Mixer:
    """Scaled dot products of normalised queries and keys in place of their softmax: linear in tokens.

    Args:
        site: the place in the backbone.
        positions: as of `galerkin_attention`.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    return _attention(site, FourierCore, "fourier", positions, composition)


def _attention(site: Site, core: type["SoftmaxFree"], who: str, positions: bool, composition: Composition) -> Mixer:
    check_flags(who, positions=positions)
    if positions and composition.get("value") is not None:
        raise Refused(
            "the heads have channels of positions, which no value part has",
            "leave out attention/value, or set attention.positions=false",
        )
    dim = head_channels(site)
    mixer = assemble(site, lambda heads, *_: core(heads, dim, positions), **composition)
    if positions:
        mixer.proj = nn.Linear(site.num_heads * (dim + COORDINATES), site.dim)
    return mixer


class HeadNorm(nn.Module):
    """LayerNorm over the channels of a head, with weights of its own for every head."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, 1, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

    def forward(self, x_BMND: Tensor) -> Tensor:
        return F.layer_norm(wide(x_BMND), x_BMND.shape[-1:]) * self.weight + self.bias


class SoftmaxFree(Core):
    """What both types have in common; sums over tokens in float32 at least."""

    def __init__(self, num_heads: int, head_dim: int, positions: bool = False) -> None:
        super().__init__()
        self.positions, self.ignores_grid = positions, not positions
        self.keys = frozenset({SAME, SHORTENED}) if positions else KEYS

    def placed(self, x_BMND: Tensor, grid: Grid) -> Tensor:
        """(B, M, N, P + D): the coordinates in front of the channels, zero for prefix tokens."""
        if not self.positions:
            return x_BMND
        axes = (torch.linspace(0, 1, side, dtype=x_BMND.dtype, device=x_BMND.device) for side in grid[:2])
        places_NP = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        places_NP = F.pad(places_NP, (0, 0, grid.prefix, 0))
        return torch.cat([places_NP.expand(*x_BMND.shape[:2], -1, -1), x_BMND], dim=-1)


class GalerkinCore(SoftmaxFree, StateCore):
    """q (LN(k)ᵀ LN(v)) / S: weights q LN(k)ᵀ / S of normalised values."""

    def __init__(self, num_heads: int, head_dim: int, positions: bool = False) -> None:
        super().__init__(num_heads, head_dim, positions)
        self.norm_k, self.norm_v = HeadNorm(num_heads, head_dim), HeadNorm(num_heads, head_dim)

    def queried(self, q_BMND: Tensor, grid: Grid) -> Tensor:
        return self.placed(wide(q_BMND), grid)

    def state(self, k_BMSD: Tensor, v_BMSD: Tensor, kv_grid: Grid) -> State:
        return (self.placed(self.norm_k(k_BMSD), kv_grid).mT @ self.valued(v_BMSD, kv_grid),)

    def read(self, q_BMND: Tensor, state: State, keys: int) -> Tensor:
        return q_BMND @ (state[0] / keys)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S), of both signs: quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            return self.placed(wide(q_BMND), grid) @ self.placed(self.norm_k(k_BMSD), kv_grid).mT / k_BMSD.shape[2]

    def valued(self, v_BMSD: Tensor, kv_grid: Grid) -> Tensor:
        """Normalised values, with coordinates."""
        return self.placed(self.norm_v(v_BMSD), kv_grid)


class FourierCore(SoftmaxFree):
    """LN(q) (LN(k)ᵀ v) / (√D S), with D the channels of queries, coordinates included."""

    def __init__(self, num_heads: int, head_dim: int, positions: bool = False) -> None:
        super().__init__(num_heads, head_dim, positions)
        self.norm_q, self.norm_k = HeadNorm(num_heads, head_dim), HeadNorm(num_heads, head_dim)

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            q, k = self._normed(q_BMND, k_BMSD, grid, kv_grid)
            o_BMND = q @ (k.mT @ self.valued(v_BMSD, kv_grid))
        return o_BMND.to(v_BMSD.dtype)

    def valued(self, v_BMSD: Tensor, kv_grid: Grid) -> Tensor:
        """Values with coordinates."""
        return self.placed(wide(v_BMSD), kv_grid)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S), of both signs: quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            q, k = self._normed(q_BMND, k_BMSD, grid, kv_grid)
            return q @ k.mT

    def _normed(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> tuple[Tensor, Tensor]:
        q, k = self.placed(self.norm_q(q_BMND), grid), self.placed(self.norm_k(k_BMSD), kv_grid)
        return q * q.shape[-1] ** -0.5, k / k.shape[2]
