"""Dual attention: some heads tell a token what others are like, other heads how it relates to them.

Source: Disentangling and Integrating Relational and Sensory Information in Transformer Architectures, Altabaa &
Lafferty, ICML 2025, arXiv:2405.16727. The first heads are softmax attention. A relational head gives, for token i,
    o_i = Σ_j α_ij (W_s s_j + W_r r_ij),   α = softmax(q kᵀ / √D),   r_ij = (⟨W_q^l x_i, W_k^l x_j⟩ / √E)_l,
with R relations l of E channels and a symbol s_j that says which one token j is without saying what it is like. Each
kind of heads has an output projection of its own, and their results stand beside each other.
Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head, R = relations, E = channels of one, P =
symbols. Relations are summed as ⟨W_q x_i, Σ_j α_ij W_k x_j⟩, so that no (R, N, N) is written out.
Beyond the authors' code, which has sequences: symbols of offsets and of positions are those of the map, and class
tokens have symbols of their own.
"""

import torch
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Mixed, Mixer, Refused, Runs, Site
from models.attention.contract.explaining import is_explaining, note
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_flags, check_whole
from models.attention.softmax import softmax_attention
from models.attention.symbols import SYMBOLS


class RelationalAttention(Mixer):
    """Sensory heads and relational heads, each with its projection.

    Args:
        site: the place in the backbone.
        relational_heads: how many of the heads, or which fraction, rounded down to one at least; not all.
        symbols: "relative" (a symbol for every offset of two tokens), "position" (one for every cell of the map) or
            "symbolic" (attention of each token over a library of symbols).
        relations: R; as many as relational heads by default.
        symmetric: a relation of i and j is that of j and i.
        num_symbols: size of the library.
        max_tokens: most tokens whose weights are written out.
        qkv_bias: bias of the queries, keys and values of sensory heads; the paper has none.
        backend: "auto", "triton" or "torch".

    Raises:
        Refused: fewer than two heads, relations that do not divide the channels, or more than `max_tokens`.
    """

    has_matrix = row_stochastic = True

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
        made = SYMBOLS[symbols](site, num_symbols, number)
        self.relational = RelationalHeads(site.dim, number, head_dim, relations or number, made, symmetric)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        return Runs("relational attention", False, "the weights of all pairs are written out for relational heads")

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        check_size(grid, self.max_tokens)
        if is_explaining():
            return Mixed(self._attended(note(self, self.attention_matrix(x_BNC, grid)), x_BNC, grid, gates_BNM), {})
        gates = (None, None) if gates_BNM is None else gates_BNM.split(self.heads, dim=-1)
        sensory = self.sensory(x_BNC, grid, gates[0]).x
        return Mixed(torch.cat([sensory, self.relational(x_BNC, grid, gates[1])], dim=-1), {})

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, M, N, N), those of the sensory heads first."""
        return torch.cat([self.sensory.attention_matrix(x_BNC, grid), self.relational.weights(x_BNC)], dim=1)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self._attended(weights, x_BNC, grid, None)

    def _attended(self, weights: Tensor, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None) -> Tensor:
        gates = (None, None) if gates_BNM is None else gates_BNM.split(self.heads, dim=-1)
        of_sensory, of_relational = weights.split(self.heads, dim=1)
        o_BMND = of_sensory @ split_heads(self.sensory.qkv(x_BNC), 3, self.heads[0])[2]
        sensory = self.sensory.proj(gated_heads(merge_heads(o_BMND), gates[0]))
        return torch.cat([sensory, self.relational.attended(of_relational, x_BNC, grid, gates[1])], dim=-1)


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
        return self.attended(self.weights(x_BNC), x_BNC, grid, gates_BNM)

    def weights(self, x_BNC: Tensor) -> Tensor:
        """α of every head, (B, M, N, N)."""
        q, k = (split_heads(layer(x_BNC), 1, self.num_heads)[0] for layer in (self.wq, self.wk))
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def attended(self, weights_BMNN: Tensor, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None) -> Tensor:
        """What the heads give with these α."""
        related_BMND = self._relations(weights_BMNN, x_BNC) @ self.wr.to(x_BNC.dtype).mT
        o_BMND = self.symbols(weights_BMNN, x_BNC, grid, self.wv) + related_BMND
        return self.wo(gated_heads(merge_heads(o_BMND), gates_BNM))

    def _relations(self, weights_BMNN: Tensor, x_BNC: Tensor) -> Tensor:
        """Σ_j α_ij r_ij: (B, M, N, R)."""
        sides = self.wq_rel(x_BNC), (self.wk_rel or self.wq_rel)(x_BNC)
        q_BRNE, k_BRNE = (split_heads(side, 1, self.relations)[0] for side in sides)
        seen_BMNRE = torch.einsum("bmij,brje->bmire", weights_BMNN.to(k_BRNE.dtype), k_BRNE)
        return torch.einsum("bmire,brie->bmir", seen_BMNRE, q_BRNE) * q_BRNE.shape[-1] ** -0.5


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
