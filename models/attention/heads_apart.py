"""Heads apart: heads of several kinds, computed each by a mechanism of its own, before the one output projection.

Source: what multi-window heads (MW-MAE, Yadav et al., ICLR 2024, arXiv:2306.00561) and other mixtures of heads share.
All kinds use one projection to queries, keys and values, each the rows of its own heads, so that the weights are those
of softmax attention by name and shape.
Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import AttentionFactory, Grid, Mixed, Mixer, Refused, Runs, Site, make
from models.attention.contract import Accepts
from models.attention.contract.explaining import grafted, is_explaining, unnoted
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.multihead import MultiHead


class HeadsApart(Mixer):
    """Projection, heads of several mechanisms, gates, projection.

    Args:
        site: the place in the backbone.
        parts: factories of multi-head mechanisms, with how many of the heads, in order, each computes.
        qkv_bias: bias of the projection.
        backend: of the parts, which have been told: "auto", "triton" or "torch".

    Raises:
        Refused: a part that is no multi-head mechanism, or numbers of heads that do not add up.
    """

    has_queries = True
    without_matrix = "heads of one kind have none, or parts change its values"

    def __init__(
        self,
        site: Site,
        parts: Sequence[tuple[AttentionFactory, int]],
        *,
        qkv_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(site, backend)
        self.num_heads, self.head_dim = site.num_heads, head_channels(site)
        self.heads = [heads for _, heads in parts]
        if sum(self.heads) != site.num_heads or min(self.heads) < 1:
            raise Refused(
                f"{self.heads} heads of several kinds are not the {site.num_heads} heads", "change model.num_heads"
            )
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(site.dim, 3 * inner, bias=qkv_bias)
        self.parts = nn.ModuleList(self._part(make, heads, site) for make, heads in parts)
        self.proj = nn.Linear(inner, site.dim)
        refusing = any(part.accepts.prefix == "refused" for part in self.parts)
        self.accepts = Accepts(prefix="refused" if refusing else "attended")
        self.reads_stream = any(part.reads_stream for part in self.parts)
        changed = any(part.pre or part.transform or part.reduce for part in self.parts)
        self.has_matrix = not changed and all(part.has_matrix for part in self.parts)
        self.row_stochastic = all(part.row_stochastic for part in self.parts)
        self.adds = any(part.adds for part in self.parts)
        for part, first in zip(self.parts, accumulate(self.heads, initial=0), strict=False):
            del part.qkv
            part.qkv, part.proj = Rows(self.qkv, self.num_heads, slice(first, first + part.num_heads)), nn.Identity()

    def _part(self, factory: AttentionFactory, heads: int, site: Site) -> MultiHead:
        part = make(factory, site._replace(num_heads=heads, head_dim=self.head_dim, stride=1))
        if not isinstance(part, MultiHead):
            raise Refused(
                f"heads of {type(part).__name__} cannot be taken apart, since it has no projection of all its heads",
                "choose multi-head mechanisms in windows, grids or whole maps, e.g. softmax",
            )
        return part

    def runs(self, gated: bool = False) -> Runs:
        """Of the first part without a kernel, else of the first."""
        runs = [part.runs(gated) for part in self.parts]
        return next((each for each in runs if not each.fused), runs[0])

    def forward(
        self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None, stream_BNC: Tensor | None = None
    ) -> Mixed:
        gates = [None] * len(self.parts) if gates_BNM is None else gates_BNM.split(self.heads, dim=-1)
        explain = is_explaining() and self.has_matrix
        with unnoted() if explain else nullcontext():
            mixed = [part(x_BNC, grid, own, stream_BNC) for part, own in zip(self.parts, gates, strict=True)]
        losses: dict[str, Tensor] = {}
        for name, loss in (item for part in mixed for item in part.losses.items()):
            losses[name] = losses.get(name, 0) + loss
        o_BNC = torch.cat([part.x for part in mixed], dim=-1)
        if explain:
            matrix, v_BMND = self.attention_matrix(x_BNC, grid), self._values(x_BNC).detach()
            o_BNC = grafted(
                self, matrix, lambda weights: gated_heads(self._heads(weights, v_BMND, grid), gates_BNM), o_BNC
            )
        return Mixed(self.proj(o_BNC), losses)

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, M, N, N) of every query on every key of the map, in the order of the heads.

        Raises:
            TypeError: heads without a matrix, or whose values are not those of the tokens.
        """
        if not self.has_matrix:
            return super().attention_matrix(x_BNC, grid)
        return torch.cat([part.token_weights(x_BNC, grid).weights for part in self.parts], dim=1)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self.proj(self._heads(weights, self._values(x_BNC), grid))

    def _heads(self, weights: Tensor, v_BMND: Tensor, grid: Grid) -> Tensor:
        """The heads (B, N, M·D) that these weights give."""
        kinds = zip(self.parts, weights.split(self.heads, dim=1), v_BMND.split(self.heads, dim=1), strict=True)
        read = [part.core.finished(own @ part.core.valued(v, grid)) for part, own, v in kinds]
        return torch.cat([merge_heads(o_BMND) for o_BMND in read], dim=-1)

    def _values(self, x_BNC: Tensor) -> Tensor:
        """Values (B, M, N, D) of the tokens."""
        return split_heads(self.qkv(x_BNC), 3, self.num_heads)[2]

    def queries(self, x_BNC: Tensor) -> Tensor:
        """Queries (B, M, N, D) of the tokens."""
        inner = self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[:inner]
        return split_heads(F.linear(x_BNC, self.qkv.weight[:inner], bias), 1, self.num_heads)[0]


class Rows:
    """The rows of some heads of a packed projection, called as if they were one; it owns nothing."""

    def __init__(self, qkv: nn.Linear, num_heads: int, heads: slice) -> None:
        self.qkv, self.num_heads, self.heads = qkv, num_heads, heads

    @property
    def weight(self) -> Tensor:
        """(3·h·D, C) of h heads."""
        return self._of(self.qkv.weight)

    @property
    def bias(self) -> Tensor | None:
        """(3·h·D), or None."""
        return None if self.qkv.bias is None else self._of(self.qkv.bias)

    def _of(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (3, self.num_heads, -1))[:, self.heads].flatten(0, 2)

    def __call__(self, x_BNC: Tensor) -> Tensor:
        return F.linear(x_BNC, self.weight, self.bias)
