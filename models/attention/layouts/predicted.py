"""Keys that a small predictor chooses for every query, and the loss by which it learns to.

Source: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, Wei et al., CVPR
2023, arXiv:2303.13755, section 3, and its authors' code. For every head, with r = N / 8 and E = D / 2,
    c = softmax((P_q q)(P_k k)ᵀ W M^-1/2),   s = c |U|ᵀ,
and a query sees the keys of its largest s; which these are has no gradient. The predictor learns by Σ (s − A)² alone, A
the softmax of all of the query's logits; in the first phase nothing is closed, and s = c Uᵀ. Class tokens see all.
Shapes: B = batch, M = heads, N = tokens, S = N keys, D = channels per head, E = of the predictor, r = columns of W, U.
W and U, one row for each token, are those of the map that they are made for: on another one they are interpolated, and
multiplied by the quotient of both numbers of cells, as weights of more keys are smaller. The loss is the mean over
images, which the authors sum, too. A row of which nothing is above the threshold gives zero, as there.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import full_precision, wide
from models.attention.contract import Grid
from models.attention.contract.layout import Groups, Layout
from models.layers.position import LearnedPosition


class Rule(NamedTuple):
    """Which keys a query keeps.

    keep: the share of all keys that have the largest scores; None for those above the `threshold`.
    threshold: of scores.
    basis: entries of |U| up to this count as 0.
    coefficients: how many of c a query keeps, or, below 1, above which; None for all.
    """

    keep: float | None
    threshold: float | None
    basis: float
    coefficients: int | float | None


class MaskPredictor(nn.Module):
    """`(q_BMND, k_BMND, grid) -> scores (B, M, N, S)` of all tokens behind the class tokens, in float32 at least.

    Args:
        num_heads, head_dim: M and D.
        grid: the map that W and U are made for.
        width: E.
        columns: r.
        rule: see `Rule`.
        shared: U = W.
    """

    def __init__(
        self, num_heads: int, head_dim: int, grid: Grid, width: int, columns: int, rule: Rule, shared: bool
    ) -> None:
        super().__init__()
        self.scale, self.grid, self.rule = num_heads**-0.5, grid, rule
        self.proj_c_q, self.proj_c_k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.proj_n = LearnedPosition(columns, grid, "bilinear")
        self.proj_back_n = None if shared else LearnedPosition(columns, grid, "bilinear")

    def forward(self, q_BMND: Tensor, k_BMND: Tensor, grid: Grid, raw: bool = False) -> Tensor:
        """`raw`: U as it is, and all of c."""
        with full_precision(q_BMND.device):
            q_BMNE, k_BMNE = _projected(self.proj_c_q, q_BMND), _projected(self.proj_c_k, k_BMND)
            logits_BMNr = q_BMNE[:, :, grid.prefix :] @ (k_BMNE.mT @ self._rows(self.proj_n, grid)) * self.scale
            c_BMNr, u_Sr = logits_BMNr.softmax(-1), self._rows(self.proj_back_n or self.proj_n, grid)
            if raw:
                return c_BMNr @ u_Sr.mT
            return self._few(c_BMNr) @ F.threshold(u_Sr.abs(), self.rule.basis, 0.0).mT

    def chosen(self, scores_BMNS: Tensor) -> Tensor:
        """(B, M, N, S): True for the keys that a query keeps."""
        if self.rule.keep is None:
            return scores_BMNS > self.rule.threshold
        budget = math.ceil(self.rule.keep * scores_BMNS.shape[-1])
        index = scores_BMNS.topk(budget, sorted=False).indices
        return torch.zeros_like(scores_BMNS, dtype=torch.bool).scatter(-1, index, True)

    def _few(self, c_BMNr: Tensor) -> Tensor:
        most = self.rule.coefficients
        if most is None:
            return c_BMNr
        if most < 1:
            return F.threshold(c_BMNr, most, 0.0)
        largest, index = c_BMNr.topk(min(most, c_BMNr.shape[-1]), sorted=False)
        return torch.zeros_like(c_BMNr).scatter(-1, index, largest)

    def _rows(self, table: LearnedPosition, grid: Grid) -> Tensor:
        """(N, r) on a map."""
        rows_Nr = wide(table.on(grid)[0])
        if grid[:2] == self.grid[:2]:
            return rows_Nr
        prefix_Pr, cells_Nr = rows_Nr.split([grid.prefix, grid.cells])
        return torch.cat([prefix_Pr, cells_Nr * (self.grid.cells / grid.cells)])


class Predicted(Layout):
    """All tokens in one group, with a mask of every image and head.

    Args:
        content: the predictor.
        dense: whether nothing is closed in training.
    """

    masks = True

    def __init__(self, content: MaskPredictor, dense: bool) -> None:
        self.content, self.dense, self.whole_rows = content, dense, content.rule.keep is not None

    def gather(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, kv_grid: Grid, content: MaskPredictor | None
    ) -> Groups:
        dense = self.dense and content.training
        scores = content(q, k, grid, raw=dense)
        losses = {"reconstruction": reconstruction(scores, q, k)} if content.training else {}
        if dense:
            return Groups(q, k, v, grid, kv_grid, {}, lambda o: o, losses)
        open_BMNS = F.pad(content.chosen(scores.detach()), (0, 0, grid.prefix, 0), value=True)
        if self.whole_rows:
            return Groups(q, k, v, grid, kv_grid, {"mask": open_BMNS}, lambda o: o, losses)
        sees_BMN1 = open_BMNS.any(-1, keepdim=True)
        given = {"mask": open_BMNS | ~sees_BMN1}  # the softmax of nothing is no number
        return Groups(q, k, v, grid, kv_grid, given, lambda o: o * sees_BMN1.to(o.dtype), losses)


def reconstruction(scores_BMNS: Tensor, q_BMND: Tensor, k_BMSD: Tensor) -> Tensor:
    """Σ (s − A)² of an image, the mean over images."""
    with full_precision(q_BMND.device):
        q, k = wide(q_BMND[:, :, q_BMND.shape[2] - scores_BMNS.shape[2] :]), wide(k_BMSD)
        error = (scores_BMNS - (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)).square().sum()
    return error / max(len(q_BMND), 1)


def _projected(layer: nn.Linear, x_BMND: Tensor) -> Tensor:
    return F.linear(wide(x_BMND), wide(layer.weight), wide(layer.bias))
