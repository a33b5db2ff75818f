"""Symbols of tokens for relational heads: they say which token one is without saying what it is like.

Source: Disentangling and Integrating Relational and Sensory Information in Transformer Architectures, Altabaa &
Lafferty, ICML 2025, arXiv:2405.16727: position-relative, positional, and symbolic attention over a learned library.
Every kind is a module `(weights_BMNN, x_BNC, grid, project) -> (B, M, N, D)`: the projected symbols that a head sees.
Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head, P = symbols.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.contract import Grid, Site
from models.attention.contract.heads import merge_heads, split_heads
from models.layers.resizable import Resizable
from models.layers.tokens import square_side


class RelativeSymbols(Resizable, nn.Module):
    """A symbol for every offset of two tokens of the map, the nearest beyond; one more where class tokens take part."""

    def __init__(self, site: Site, num_symbols: int = 0, num_heads: int = 0) -> None:
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
        return resized(value, (side, side), self.sides)


class SymbolicAttention(nn.Module):
    """Every token attends to a library of symbols, by the features of templates."""

    def __init__(self, site: Site, num_symbols: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, dim = num_heads, site.dim
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
        q, k, v = (head.expand(x_BNC.shape[0], -1, -1, -1) for head in heads)
        return merge_heads(F.scaled_dot_product_attention(q, k, v))


class PositionSymbols(Resizable, nn.Module):
    """A symbol for every cell of the map, resized to another map; more for class tokens."""

    def __init__(self, site: Site, num_symbols: int = 0, num_heads: int = 0) -> None:
        super().__init__()
        self.sides = tuple(site.grid[:2])
        self.table = nn.Parameter(torch.empty(site.grid.cells, site.dim))
        self.prefix_symbols = nn.Parameter(torch.empty(site.grid.prefix, site.dim)) if site.grid.prefix else None
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, weights_BMNN: Tensor, x_BNC: Tensor, grid: Grid, project: nn.Linear) -> Tensor:
        symbols_NC = resized(self.table, self.sides, grid[:2])
        if self.prefix_symbols is not None:
            symbols_NC = torch.cat([self.prefix_symbols, symbols_NC])
        values = split_heads(project(symbols_NC[None]), 1, weights_BMNN.shape[1])[0]
        return weights_BMNN.to(values.dtype) @ values

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A table of another square map as the one of this module; the rest stays as it is."""
        if name != "table":
            return value
        side = square_side(value.shape[0], "tokens")
        return resized(value, (side, side), self.sides)


def resized(table_PC: Tensor, sides: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of a map for another one, bicubically."""
    if tuple(sides) == tuple(new):
        return table_PC
    table_1CHW = table_PC.unflatten(0, sides).permute(2, 0, 1)[None]
    return F.interpolate(table_1CHW, size=tuple(new), mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)


SYMBOLS = {"relative": RelativeSymbols, "position": PositionSymbols, "symbolic": SymbolicAttention}
