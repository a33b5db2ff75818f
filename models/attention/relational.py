"""Dual attention: some heads tell a token what others are like, other heads how it relates to them.

Source: Disentangling and Integrating Relational and Sensory Information in Transformer Architectures, Altabaa &
Lafferty, ICML 2025, arXiv:2405.16727. The first heads are softmax attention. A relational head gives, for token i,
    o_i = Σ_j α_ij (W_s s_j + W_r r_ij),   α = softmax(q kᵀ / √D),   r_ij = (⟨W_q^l x_i, W_k^l x_j⟩ / √E)_l,
with R relations l of E channels and a symbol s_j that says which one token j is without saying what it is like. Each
kind of heads has an output projection of its own, and their results stand beside each other.
Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head, R = relations, E = channels of one, P =
symbols. Relations are summed as ⟨W_q x_i, Σ_j α_ij W_k x_j⟩, so that no (R, N, N) is written out.
Beyond the authors' code, which has sequences: relative symbols are of the offset on the map, one more is for class
tokens, and there is no table of absolute positions, since backbones add those.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Mixed, Mixer, Refused, Runs, Site
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_flags, check_whole
from models.attention.softmax import softmax_attention
from models.layers.resizable import Resizable
from models.layers.tokens import square_side

SYMBOLS = ("relative", "symbolic")


class RelationalAttention(Mixer):
    """Sensory heads and relational heads, each with its projection.

    Args:
        site: the place in the backbone.
        relational_heads: how many of the heads, or which fraction, rounded down to one at least; not all.
        symbols: "relative" (a symbol for every offset of two tokens) or "symbolic" (attention of each token over a
            library of symbols).
        relations: R; as many as relational heads by default.
        symmetric: a relation of i and j is that of j and i.
        num_symbols: size of the library.
        max_tokens: most tokens whose weights are written out.
        qkv_bias: bias of the queries, keys and values of sensory heads; the paper has none.
        backend: "auto", "triton" or "torch".

    Raises:
        Refused: fewer than two heads, relations that do not divide the channels, or more than `max_tokens`.
    """

    def __init__(
        self,
        site: Site,
        *,
        relational_heads: int | float = 0.5,
        symbols: str = "relative",
        relations: int | None = None,
        symmetric: bool = False,
        num_symbols: int = 16,
        max_tokens: int = 4096,
        qkv_bias: bool = False,
        backend: str = "auto",
    ) -> None:
        values.choice("relational", "symbols", symbols, SYMBOLS, fix="set attention.symbols")
        check_flags("relational", symmetric=symmetric, qkv_bias=qkv_bias)
        check_whole("relational", num_symbols=num_symbols, max_tokens=max_tokens)
        check_whole("relational", relations=1 if relations is None else relations)
        head_dim = head_channels(site, even=True)
        number = heads_of(relational_heads, site)
        check_size(site.grid, max_tokens)
        super().__init__(site, backend)
        self.heads, self.max_tokens = [site.num_heads - number, number], max_tokens
        inner = self.heads[0] * head_dim
        self.sensory = softmax_attention(
            site._replace(num_heads=self.heads[0], head_dim=head_dim), qkv_bias=qkv_bias, backend=backend
        )
        self.sensory.proj = nn.Linear(inner, inner, bias=False)
        made = RelativeSymbols(site) if symbols == "relative" else SymbolicAttention(site.dim, num_symbols, number)
        self.relational = RelationalHeads(site.dim, number, head_dim, relations or number, made, symmetric)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        return Runs("relational attention", False, "the weights of all pairs are written out for relational heads")

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        check_size(grid, self.max_tokens)
        gates = (None, None) if gates_BNM is None else gates_BNM.split(self.heads, dim=-1)
        sensory = self.sensory(x_BNC, grid, gates[0]).x
        return Mixed(torch.cat([sensory, self.relational(x_BNC, grid, gates[1])], dim=-1), {})


class RelationalHeads(nn.Module):
    """`(x_BNC, grid) -> (B, N, M·D)`.

    Args:
        dim: C.
        num_heads, head_dim: M and D.
        relations: R; E is M·D / R.
        symbols: `(weights_BMNN, x_BNC, grid, project) -> (B, M, N, D)`, the symbols that a head sees.
        symmetric: one projection for both sides of a relation.
    """

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, relations: int, symbols: nn.Module, symmetric: bool
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        if inner % relations:
            raise Refused(
                f"{inner} channels of relational heads do not divide into relations={relations}",
                "set attention.relations=null",
            )
        self.num_heads, self.relations, self.symbols = num_heads, relations, symbols
        self.wq, self.wk, self.wq_rel, self.wv = (nn.Linear(dim, inner, bias=False) for _ in range(4))
        self.wk_rel = None if symmetric else nn.Linear(dim, inner, bias=False)
        self.wr = nn.Parameter(torch.empty(num_heads, head_dim, relations))
        nn.init.uniform_(self.wr, -(relations**-0.5), relations**-0.5)
        self.wo = nn.Linear(inner, inner, bias=False)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Tensor:
        q, k = (split_heads(layer(x_BNC), 1, self.num_heads)[0] for layer in (self.wq, self.wk))
        weights_BMNN = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        related_BMND = self._relations(weights_BMNN, x_BNC) @ self.wr.to(x_BNC.dtype).mT
        o_BMND = self.symbols(weights_BMNN, x_BNC, grid, self.wv) + related_BMND
        return self.wo(gated_heads(merge_heads(o_BMND), gates_BNM))

    def _relations(self, weights_BMNN: Tensor, x_BNC: Tensor) -> Tensor:
        """Σ_j α_ij r_ij: (B, M, N, R)."""
        sides = self.wq_rel(x_BNC), (self.wk_rel or self.wq_rel)(x_BNC)
        q_BRNE, k_BRNE = (split_heads(side, 1, self.relations)[0] for side in sides)
        seen_BMNRE = torch.einsum("bmij,brje->bmire", weights_BMNN.to(k_BRNE.dtype), k_BRNE)
        return torch.einsum("bmire,brie->bmir", seen_BMNRE, q_BRNE) * q_BRNE.shape[-1] ** -0.5


class RelativeSymbols(Resizable, nn.Module):
    """A symbol for every offset of two tokens of the map, the nearest beyond; one more where class tokens take part."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.sides = tuple(2 * side - 1 for side in site.grid[:2])
        self.table = nn.Parameter(torch.empty(math.prod(self.sides), site.dim))
        self.prefix_symbol = nn.Parameter(torch.empty(1, site.dim)) if site.grid.prefix else None
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, weights_BMNN: Tensor, x_BNC: Tensor, grid: Grid, project: nn.Linear) -> Tensor:
        symbols_PC = self.table if self.prefix_symbol is None else torch.cat([self.table, self.prefix_symbol])
        values_MPD = split_heads(project(symbols_PC[None]), 1, weights_BMNN.shape[1])[0][0]
        shares = weights_BMNN.new_zeros(*weights_BMNN.shape[:3], len(symbols_PC))
        index_NN = self.offset(grid, weights_BMNN.device).expand_as(weights_BMNN)
        return shares.scatter_add(-1, index_NN, weights_BMNN).to(values_MPD.dtype) @ values_MPD

    def offset(self, grid: Grid, device: torch.device) -> Tensor:
        """(N, N): which symbol a query has for a key, by key minus query."""
        axes = []
        for side, most in zip(grid[:2], self.sides, strict=True):
            place = torch.arange(side, device=device)
            axes.append((place[None] - place[:, None] + most // 2).clamp(0, most - 1))
        rows, columns = axes
        index = (rows[:, None, :, None] * self.sides[1] + columns[None, :, None, :]).flatten(2).flatten(0, 1)
        return F.pad(index, (grid.prefix, 0, grid.prefix, 0), value=len(self.table))

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A table of another square map as the one of this module, bicubically; the rest stays as it is."""
        if name != "table":
            return value
        side = square_side(value.shape[0], "offsets")
        table_1CHW = value.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        return F.interpolate(table_1CHW, size=self.sides, mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)


class SymbolicAttention(nn.Module):
    """Every token attends to a library of symbols, by the features of templates."""

    def __init__(self, dim: int, num_symbols: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.template_features = nn.Parameter(torch.randn(num_symbols, dim))
        self.symbol_library = nn.Parameter(torch.randn(num_symbols, dim))
        self.q_proj = nn.Linear(dim, dim)

    def forward(self, weights_BMNN: Tensor, x_BNC: Tensor, grid: Grid, project: nn.Linear) -> Tensor:
        values = split_heads(project(self.retrieve(x_BNC)), 1, weights_BMNN.shape[1])[0]
        return weights_BMNN.to(values.dtype) @ values

    def retrieve(self, x_BNC: Tensor) -> Tensor:
        """The symbol of every token, (B, N, C)."""
        parts = (self.q_proj(x_BNC), self.template_features[None], self.symbol_library[None])
        heads = (split_heads(part.to(x_BNC.dtype), 1, self.num_heads)[0] for part in parts)
        q, k, v = (head.expand(len(x_BNC), -1, -1, -1) for head in heads)
        return merge_heads(F.scaled_dot_product_attention(q, k, v))


def heads_of(relational_heads: int | float, site: Site) -> int:
    """How many heads are relational.

    Raises:
        ValueError: neither a number of heads nor a fraction.
        Refused: none or all.
    """
    check = values.fraction if isinstance(relational_heads, float) else values.whole
    what = "a number of heads or a fraction between 0.0 and 1.0"
    check("relational", "relational_heads", relational_heads, what=what, fix="set attention.relational_heads")
    number = relational_heads
    if isinstance(relational_heads, float):
        number = max(int(relational_heads * site.num_heads), 1)
    if number >= site.num_heads:
        raise Refused(
            f"{number} of {site.num_heads} heads are relational, which leaves none for what tokens are like",
            "lower attention.relational_heads, or raise model.num_heads",
        )
    return number


def check_size(grid: Grid, most: int) -> None:
    """Refuses weights of all pairs of more tokens than `most`."""
    if grid.tokens > most:
        raise Refused(
            f"relational heads write out the weights of {grid.tokens} x {grid.tokens} pairs, more than "
            f"max_tokens={most} allows",
            "raise attention.max_tokens, or choose another mechanism for large maps",
        )
