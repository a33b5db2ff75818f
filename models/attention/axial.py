"""Axial attention: tokens see those of their column, and with other weights those of their row.

Source: Axial Attention in Multidimensional Transformers, Ho et al., 2019, arXiv:1912.12180; the form of the common
implementation (lucidrains/axial-attention), where each axis has projections of its own to queries, to keys and values
and to the output, and the results are summed, or one axis follows the other without a residual between.
Shapes: B = batch, N = H·W tokens, C = channels, M = heads.
Images have two axes, as has every `Grid` here; the third of a video would need maps of three sides. The layout `axial`
is the same with one projection for both axes, and for any core.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from models.attention.contract import Accepts, Grid, Mixed, Mixer, Runs, Site
from models.attention.contract.explaining import grafted, is_explaining, unnoted
from models.attention.contract.heads import gated_heads, merge_heads, split_heads
from models.attention.contract.options import check_flags
from models.attention.layouts.axial import axial
from models.attention.softmax import softmax_attention


class AxialAttention(Mixer):
    """Softmax attention along the columns and along the rows.

    Args:
        site: the place in the backbone; the map has no prefix tokens.
        summed: the sum of both; else rows attend to what columns gave.
        head_dim: channels per head; C / M by default.
        qkv_bias: bias of the projections to queries, keys and values.
        backend: "auto", "triton" or "torch".
    """

    accepts = Accepts(prefix="refused")
    without_matrix = "its rows attend to what its columns gave (summed=false), which no single matrix says"

    def __init__(
        self,
        site: Site,
        *,
        summed: bool = True,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        backend: str = "auto",
    ) -> None:
        check_flags("axial", summed=summed, qkv_bias=qkv_bias)
        super().__init__(site, backend)
        self.summed = self.has_matrix = self.row_stochastic = summed
        along = partial(softmax_attention, site, head_dim=head_dim, qkv_bias=qkv_bias, backend=backend)
        self.columns, self.rows = (along(layout=partial(axial, along=axis)) for axis in ("columns", "rows"))

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        return self.columns.runs(gated)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        explain = is_explaining() and self.has_matrix
        with unnoted() if explain else nullcontext():
            along_columns = self.columns(x_BNC, grid, gates_BNM).x
            if not self.summed:
                return self.rows(along_columns, grid, gates_BNM)
            o_BNC = along_columns + self.rows(x_BNC, grid, gates_BNM).x
        if explain:
            matrix, x = self.attention_matrix(x_BNC, grid), x_BNC.detach()
            o_BNC = grafted(self, matrix, lambda weights: self._read(weights, x, gates_BNM), o_BNC)
        return Mixed(o_BNC, {})

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, 2·M, N, N) on the map: of the heads along columns, then of those along rows.

        Raises:
            TypeError: rows attend to what columns gave.
        """
        if not self.has_matrix:
            return super().attention_matrix(x_BNC, grid)
        return torch.cat([axis.token_weights(x_BNC, grid).weights for axis in (self.columns, self.rows)], dim=1)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self._read(weights, x_BNC, None)

    def _read(self, weights: Tensor, x_BNC: Tensor, gates_BNM: Tensor | None) -> Tensor:
        along_columns, along_rows = (
            axis.proj(gated_heads(merge_heads(own @ split_heads(axis.qkv(x_BNC), 3, axis.num_heads)[2]), gates_BNM))
            for axis, own in zip((self.columns, self.rows), weights.chunk(2, dim=1), strict=True)
        )
        return along_columns + along_rows
