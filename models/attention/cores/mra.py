"""Multi-resolution attention: one logit for each pair of blocks, and exact logits where these are largest.

Source: Multi Resolution Analysis (MRA) for Approximate Self-Attention, Zeng et al., ICML 2022, arXiv:2207.10284,
section 4 and algorithm 1. For queries i of block r, keys j of block s and the set J of refined pairs of blocks,
    c_rs = mean(q_r) · mean(k_s) / √D,    J = the pairs with the largest c_rs - max_s c_rs
    o_i = softmax_j(q_i · k_j / √D where (r, s) in J, else c_rs) v_j
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head; R = blocks of T queries, P of T keys, K =
refined pairs.
As in the authors' code the tokens of an image make blocks of 4 × 8 cells. That takes multiples of these alone; here a
map is filled up, and no query sees what fills it: means are of the tokens. Class tokens make a block of their own. Of
equal pairs the first are refined. `mode="sparse"` leaves out what is not refined, and a query of which nothing is gets
zero.
"""

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from conf import values
from kernels.order import sorted_stably
from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.cells import Cell, cut, held, join
from models.attention.contract import Grid, Mixer, Site
from models.attention.contract.layout import SAME, SHORTENED
from models.attention.contract.options import check_whole
from models.attention.multihead import Core

MODES = ("full", "sparse")


def mra_attention(
    site: Site,
    *,
    cell: int | Sequence[int] = (4, 8),
    per_row: int = 4,
    num_blocks: int | None = None,
    mode: str = "full",
    **composition: Unpack[Composition],
) -> Mixer:
    """Softmax attention of which a budget of blocks is exact.

    Args:
        site: the place in the backbone.
        cell: height and width of a block, in tokens. Paper: 4 × 8 of an image, 32 of a sequence.
        per_row: how many blocks of keys are refined for each block of queries, on average.
        num_blocks: how many pairs of blocks are refined in each head; None for `per_row` times the blocks.
        mode: "full", or "sparse" without coarse blocks.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: a number that is none, or an unknown mode.
    """
    sides = values.pair("mra", "cell", cell, fix="set attention.cell, e.g. [4, 8]")
    check_whole("mra", per_row=per_row, num_blocks=1 if num_blocks is None else num_blocks)
    values.choice("mra", "mode", mode, MODES, fix="set attention.mode")
    return assemble(site, lambda *_: MRACore(sides, per_row, num_blocks, mode), **composition)


class MRACore(Core):
    """No parameters; in float32 at least. Options as of `mra_attention`."""

    keys = frozenset({SAME, SHORTENED})

    def __init__(
        self, cell: Cell = (4, 8), per_row: int = 4, num_blocks: int | None = None, mode: str = "full"
    ) -> None:
        super().__init__()
        self.cell, self.per_row, self.num_blocks, self.full = cell, per_row, num_blocks, mode == "full"
        self.row_stochastic = self.full

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            q_BMRTD, k_BMPTD, coarse_BMRP, refined_BMK = self._blocks(q_BMND, k_BMSD, grid, kv_grid)
            counted = torch.cat([wide(v_BMSD), torch.ones_like(v_BMSD[..., :1], dtype=q_BMRTD.dtype)], dim=-1)
            v_BMPTE = cut(counted, kv_grid, self.cell)  # the last channel sums up the weights
            rows, columns = refined_BMK // coarse_BMRP.shape[3], refined_BMK % coarse_BMRP.shape[3]
            fine_BMKTT = _taken(q_BMRTD, rows) @ _taken(k_BMPTD, columns).mT
            fine_BMKTT = fine_BMKTT.masked_fill(
                ~held(kv_grid, self.cell, columns.device)[columns][..., None, :], -math.inf
            )
            most_BMR = coarse_BMRP.amax(-1, keepdim=True) if self.full else coarse_BMRP[..., :1].new_tensor(-math.inf)
            shift_BMRT = _largest(most_BMR.expand(q_BMRTD.shape[:4]), rows, fine_BMKTT)
            exact = (fine_BMKTT - _taken(shift_BMRT, rows)[..., None]).exp() @ _taken(v_BMPTE, columns)
            o_BMRTE = exact.new_zeros(*q_BMRTD.shape[:4], exact.shape[-1]).scatter_add(2, _each(rows, exact), exact)
            if self.full:
                shares_BMRP = (
                    (coarse_BMRP - most_BMR).exp().flatten(2).scatter(2, refined_BMK, 0.0).view_as(coarse_BMRP)
                )
                others_BMRE = shares_BMRP @ v_BMPTE.sum(3)
                o_BMRTE = o_BMRTE + others_BMRE[:, :, :, None] * (most_BMR - shift_BMRT).exp()[..., None]
            o_BMND, total = join(o_BMRTE, grid, self.cell).split([v_BMSD.shape[3], 1], dim=-1)
        return (o_BMND / total.where(total > 0, 1.0)).to(v_BMSD.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S): quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            _, _, coarse_BMRP, refined_BMK = self._blocks(q_BMND, k_BMSD, grid, kv_grid)
            is_fine = torch.zeros_like(coarse_BMRP).flatten(2).scatter(2, refined_BMK, 1.0).view_as(coarse_BMRP)
            exact = wide(q_BMND) @ wide(k_BMSD).mT * q_BMND.shape[-1] ** -0.5
            is_fine, coarse = (self._on_tokens(of_blocks, grid, kv_grid) for of_blocks in (is_fine, coarse_BMRP))
            if self.full:
                return torch.where(is_fine > 0, exact, coarse).softmax(-1)
            seen = is_fine.any(-1, keepdim=True)
            return exact.masked_fill((is_fine == 0) & seen, -math.inf).softmax(-1) * seen

    def refined(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """(B, M, K): the pairs of blocks that are exact, as numbers in row-major order."""
        return self._blocks(q_BMND, k_BMSD, grid, kv_grid)[3]

    def _blocks(self, q: Tensor, k: Tensor, grid: Grid, kv_grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries with their scale and keys in blocks, logits of pairs of blocks, and which of these are refined."""
        q, k = cut(wide(q) * q.shape[-1] ** -0.5, grid, self.cell), cut(wide(k), kv_grid, self.cell)
        counts = [held(of, self.cell, q.device).sum(-1, keepdim=True) for of in (grid, kv_grid)]
        coarse_BMRP = (q.sum(3) / counts[0]) @ (k.sum(3) / counts[1]).mT
        gain = (coarse_BMRP - coarse_BMRP.amax(-1, keepdim=True)).detach().flatten(2)
        budget = min(self.num_blocks or self.per_row * coarse_BMRP.shape[2], gain.shape[2])
        return q, k, coarse_BMRP, sorted_stably(gain, descending=True).indices[..., :budget]

    def _on_tokens(self, of_blocks_BMRP: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """(B, M, N, S): what pairs of blocks have, for each pair of their tokens."""
        places = self.cell[0] * self.cell[1]
        rows = join(of_blocks_BMRP[:, :, :, None].expand(-1, -1, -1, places, -1), grid, self.cell)
        return join(rows.mT[:, :, :, None].expand(-1, -1, -1, places, -1), kv_grid, self.cell).mT


def _each(index_BMK: Tensor, like: Tensor) -> Tensor:
    """The same index for all that a block holds."""
    return index_BMK.view(*index_BMK.shape, *[1] * (like.dim() - 3)).expand(*index_BMK.shape, *like.shape[3:])


def _taken(x_BMR: Tensor, index_BMK: Tensor) -> Tensor:
    """Blocks (B, M, K, …) of (B, M, R, …)."""
    return x_BMR.gather(2, _each(index_BMK, x_BMR))


@torch.no_grad()
def _largest(least_BMRT: Tensor, rows_BMK: Tensor, fine_BMKTT: Tensor) -> Tensor:
    """(B, M, R, T): the largest logit of every query, which is taken off all."""
    found_BMKT = fine_BMKTT.amax(-1)
    return least_BMRT.scatter_reduce(2, _each(rows_BMK, found_BMKT), found_BMKT, "amax")
