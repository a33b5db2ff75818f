"""Kernelised attention with relative positions: positive features of unit queries and keys, a factor for each offset.

Source: Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding, Luo et al., NeurIPS 2021,
arXiv:2106.12566, equations 8 and 10. With q and k of length one per head, b a learned table of offsets:
    o_i = φ(q_i) · Σ_j e^{b_(j-i)} φ(k_j) v_jᵀ / φ(q_i) · Σ_j e^{b_(j-i)} φ(k_j)
Shapes: B = batch, N = prefix + H·W tokens, M = heads, D = channels per head, F = features.
Both sums are correlations over the map with e^b, computed by a fast Fourier transform of F·(D + 1) channels in float32.
φ are positive random features, φ(x) = exp(w x) with orthogonal w of normal lengths (Performer, arXiv:2009.14794), whose
constant factor of unit vectors cancels; or, without anything random, exp(x) and exp(-x). The table starts at 0. Class
tokens have b = 0 with every token.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Refused, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME
from models.attention.contract.options import check_whole
from models.attention.contract.places import OffsetTable
from models.attention.multihead import Core

FEATURES = ("positive", "signs")


def nprf_attention(
    site: Site, *, features: str = "positive", num_features: int | None = None, **composition: Unpack[Composition]
) -> Mixer:
    """Linear attention with a relative position bias inside its exponential.

    Args:
        site: the place in the backbone.
        features: "positive" random ones, or "signs": exp(x) and exp(-x).
        num_features: F of positive ones; None for D.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: unknown features, or a number that is none.
        Refused: a number of features that are no random ones.
    """
    values.choice("nprf", "features", features, FEATURES, fix="set attention.features")
    check_whole("nprf", num_features=1 if num_features is None else num_features)
    if features == "signs" and num_features is not None:
        raise Refused(
            "features=signs are two of each channel, which num_features cannot change",
            "set attention.num_features=null",
        )
    dim = head_channels(site)
    count = (num_features or dim) if features == "positive" else 0
    return assemble(site, lambda heads, grid, _: NPRFCore(heads, dim, tuple(grid[:2]), count), **composition)


class Offsets(OffsetTable):
    """The table b, which starts at 0."""

    def __init__(self, num_heads: int, size: tuple[int, int]) -> None:
        super().__init__(num_heads, size)
        nn.init.zeros_(self.table)


class NPRFCore(Core):
    """Features, a table of offsets, and the correlations of both; in float32 at least.

    Args:
        num_heads, head_dim: M and D.
        size: of the map that it is built for.
        num_features: F, random ones; 0 for exp(±x).
    """

    keys = frozenset({SAME})
    row_stochastic = True

    def __init__(self, num_heads: int, head_dim: int, size: tuple[int, int], num_features: int = 0) -> None:
        super().__init__()
        self.bias = Offsets(num_heads, size)
        self.register_buffer("directions", orthogonal(num_features, head_dim) if num_features else None)

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            q_BMNF, k_BMSF = self.featured(q_BMND), self.featured(k_BMSD)
            counted = torch.cat([wide(v_BMSD), torch.ones_like(k_BMSF[..., :1])], dim=-1)
            each_BMSFE = k_BMSF[..., None] * counted[..., None, :]  # the last channel sums up the weights
            summed_BMNFE = self._correlated(each_BMSFE.flatten(3), grid).view_as(each_BMSFE)
            o_BMND, total = (q_BMNF[..., None, :] @ summed_BMNFE)[..., 0, :].split([v_BMSD.shape[3], 1], dim=-1)
        return (o_BMND / total).to(v_BMSD.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S): quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            factor_MNS = (wide(self.bias(grid, kv_grid)) - self._largest()).exp()
            weights = self.featured(q_BMND) @ self.featured(k_BMSD).mT * factor_MNS
            return weights / weights.sum(-1, keepdim=True)

    def featured(self, x_BMND: Tensor) -> Tensor:
        """φ of vectors of length one: (B, M, N, F)."""
        unit = F.normalize(wide(x_BMND), dim=-1)
        if self.directions is None:
            return torch.cat([unit, -unit], dim=-1).exp()
        return (unit @ self.directions.to(unit.dtype).T).exp()

    def _correlated(self, x_BMSE: Tensor, grid: Grid) -> Tensor:
        """For every query the sum over keys of e^b times what they have."""
        if not x_BMSE.shape[0]:  # which MKL refuses
            return x_BMSE
        ahead_BMPE, map_BMSE = x_BMSE.split([grid.prefix, grid.cells], dim=2)
        sides = (2 * grid.height, 2 * grid.width)
        factor_M1YX, map_BMEHW = self._factor(grid, x_BMSE.dtype)[:, None], map_BMSE.mT.unflatten(3, grid[:2])
        spectrum = torch.fft.rfft2(map_BMEHW, s=sides) * torch.fft.rfft2(factor_M1YX)
        found = torch.fft.irfft2(spectrum, s=sides)[..., : grid.height, : grid.width].flatten(3).mT
        if not grid.prefix:
            return found
        sums = [part.sum(2, keepdim=True) * (-self._largest()).exp() for part in (ahead_BMPE, map_BMSE)]
        return torch.cat([sum(sums).expand_as(ahead_BMPE), found + sums[0]], dim=2)

    def _factor(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """(M, 2H, 2W): e^b, up to `_largest`, of the offsets 0, …, H - 1, none, 1 - H, …, -1, query minus key."""
        axes = [torch.arange(2 * side, device=self.bias.table.device) for side in grid[:2]]
        axes = [torch.where(axis < len(axis) // 2, axis, axis - len(axis)) for axis in axes]
        b_MYX = self.bias.at(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)).to(dtype)
        return (b_MYX - self._largest()).exp()

    def _largest(self) -> Tensor:
        """(M, 1, 1): what is taken off b, and cancels, so that no exponential is too large."""
        return wide(self.bias.table.detach()).amax((1, 2), keepdim=True).clamp_min(0)


def orthogonal(count: int, dim: int) -> Tensor:
    """(F, D): normal vectors, made orthogonal D at a time, with the lengths that others have."""
    blocks = torch.linalg.qr(torch.randn(-(-count // dim), dim, dim))[0].mT.flatten(0, 1)[:count]
    return blocks * torch.randn(count, dim).norm(dim=-1, keepdim=True)
