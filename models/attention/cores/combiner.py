"""Combiner on the axes of a map: every token sees its row, and of every row a summary as seen from its column.

Source: Combiner: Full Attention Transformer with Sparse Computation Cost, Ren et al., NeurIPS 2021, arXiv:2107.05768,
equations 4 to 6, without its causal mask. For a token of row r and column c, with ρ the weights of tokens in their row,
    ρ_(k,c)j = softmax_j(q_kc · k_kj / √D),    K_kc = Σ_j ρ_(k,c)j k_kj,    V_kc = Σ_j ρ_(k,c)j v_kj
    o_rc = Σ_j a_j v_rj + Σ_k b_k V_kc,    (a, b) = softmax over W + H logits of (q_rc · k_rj, q_rc · K_kc) / √D
so that each token has a weight a_j + b_k ρ on every other. `summaries="fixed"`: those of a row are the same from all
columns, ρ_kj = softmax_j(mean_c(q_kc) · k_kj / √D) and K_k = mean_c(k_kc).
Shapes: B = batch, N = H·W tokens, M = heads, D = channels per head.
These are the authors' `axial_rowmajor` with `row_summary=wsum` and their `sqrt_fixed_full` with `identity-mean`, on an
image's rows, without the causal mask: so a token sees the summary of its own row too.
"""

from typing import Unpack

import torch
from torch import Tensor

from conf import values
from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.contract import Accepts, Grid, Mixer, Site
from models.attention.contract.layout import SAME
from models.attention.multihead import Core

SUMMARIES = ("axial", "fixed")


def combiner_attention(site: Site, *, summaries: str = "axial", **composition: Unpack[Composition]) -> Mixer:
    """Attention of every token on every other, by way of summaries of rows.

    Args:
        site: the place in the backbone; the map has no prefix tokens.
        summaries: of rows: "axial", one for each column, or "fixed".
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: unknown summaries.
    """
    values.choice("combiner_axial", "summaries", summaries, SUMMARIES, fix="set attention.summaries")
    return assemble(site, lambda *_: CombinerCore(summaries), accepts=Accepts(prefix="refused"), **composition)


class CombinerCore(Core):
    """No parameters; in float32 at least."""

    keys = frozenset({SAME})
    row_stochastic = True

    def __init__(self, summaries: str = "axial") -> None:
        super().__init__()
        self.fixed = summaries == "fixed"

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            own_BMHWW, rows_BMHWH, rho_BMHWW = self._weights(q_BMND, k_BMSD, grid)
            v_BMHWD = wide(v_BMSD).unflatten(2, grid[:2])
            summed_BMHWD = (rho_BMHWW @ v_BMHWD).expand_as(v_BMHWD)
            from_rows = rows_BMHWH.transpose(2, 3) @ summed_BMHWD.transpose(2, 3)
            o_BMHWD = own_BMHWW @ v_BMHWD + from_rows.transpose(2, 3)
        return o_BMHWD.flatten(2, 3).to(v_BMSD.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, N) of tokens on tokens: quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            own_BMHWW, rows_BMHWH, rho_BMHWW = self._weights(q_BMND, k_BMSD, grid)
            by_rows = torch.einsum("bmrck,bmkcj->bmrckj", rows_BMHWH, rho_BMHWW.expand_as(own_BMHWW))
            same_HH = torch.eye(grid.height, dtype=by_rows.dtype, device=by_rows.device)
            return (by_rows + same_HH[:, None, :, None] * own_BMHWW[..., None, :]).flatten(4).flatten(2, 3)

    def _weights(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """a (B, M, H, W, W), b (B, M, H, W, H), and ρ (B, M, H, W, W), or with one column for all that are fixed."""
        q, k = (wide(t).unflatten(2, grid[:2]) for t in (q_BMND * q_BMND.shape[-1] ** -0.5, k_BMSD))
        own = q @ k.mT
        rho = (q.mean(3, keepdim=True) @ k.mT if self.fixed else own).softmax(-1)
        summed = k.mean(3, keepdim=True).expand_as(k) if self.fixed else rho @ k
        rows = (q.transpose(2, 3) @ summed.permute(0, 1, 3, 4, 2)).transpose(2, 3)
        both = torch.cat([own, rows], dim=-1).softmax(-1)
        return *both.split([grid.width, grid.height], dim=-1), rho
