"""A reading of hierarchical self-attention: tokens see those of their leaf of a quad-tree, and means of other nodes.

Source: Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems, Amizadeh et al.,
2025, arXiv:2509.15448, whose weights are those nearest to softmax that are constant on blocks of a tree. No code is
public, and this is not its dynamic programme. Here the map is cut into leaves, and up to four neighbouring nodes have a
parent, up to one root. A token in leaf ℓ with ancestors a, whose other children are s of n_s tokens each,
    o = softmax over (q · k_j for j in ℓ, q · mean_s(k) + log n_s for all s of all a), times (v_j, mean_s(v)),   q / √D
Shapes: B = batch, N = H·W tokens, M = heads, D = channels per head; R = leaves, Y X = nodes of a level, T = tokens of a
leaf, K = children of its ancestors.
What completes a map to whole leaves and to whole families is never seen. Keys that are equal inside of every node give
what softmax attention gives.
"""

import math
from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from conf import values
from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.cells import Cell, cut, held, join
from models.attention.contract import Accepts, Grid, Mixer, Site
from models.attention.contract.layout import SAME
from models.attention.multihead import Core


def hierarchical_attention(site: Site, *, leaf: int | Sequence[int] = 4, **composition: Unpack[Composition]) -> Mixer:
    """Attention on a quad-tree of the map.

    Args:
        site: the place in the backbone; the map has no prefix tokens.
        leaf: height and width of a leaf, in tokens; at most the map.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: sides that are none.
    """
    sides = values.pair("hierarchical", "leaf", leaf, fix="set attention.leaf, e.g. 4")
    return assemble(site, lambda *_: HierarchicalCore(sides), accepts=Accepts(prefix="refused"), **composition)


class HierarchicalCore(Core):
    """No parameters; in float32 at least."""

    keys = frozenset({SAME})
    row_stochastic = True

    def __init__(self, leaf: Cell) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            return self._read(self._weights(q_BMND, k_BMSD, grid), wide(v_BMSD), grid).to(v_BMSD.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, N) of tokens on tokens: quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            weights = self._weights(q_BMND, k_BMSD, grid)
            return self._read(
                weights, torch.eye(grid.cells, dtype=weights.dtype, device=weights.device)[None, None], grid
            )

    def _weights(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid) -> Tensor:
        """(B, M, R, T, T + K): on the tokens of the leaf, and on the nodes."""
        cell, device = self._cell(grid), q_BMND.device
        q_BMRTD, k_BMRTD = cut(wide(q_BMND) * q_BMND.shape[-1] ** -0.5, grid, cell), cut(wide(k_BMSD), grid, cell)
        own = (q_BMRTD @ k_BMRTD.mT).masked_fill(~held(grid, cell, device)[:, None], -math.inf)
        own_RK = own_children(*self._leaves(grid), device)
        prior_RK = self._counts(grid, device).log().masked_fill(own_RK, -math.inf).to(own.dtype)
        others = q_BMRTD @ self._means(k_BMRTD, grid).mT + prior_RK[:, None]
        return torch.cat([own, others], dim=-1).softmax(-1)

    def _read(self, weights_BMRTK: Tensor, v_BMSD: Tensor, grid: Grid) -> Tensor:
        """(B, M, N, D): what the weights give of these values."""
        v_BMRTD = cut(v_BMSD, grid, self._cell(grid))
        places = v_BMRTD.shape[3]
        own, others = weights_BMRTK.split([places, weights_BMRTK.shape[4] - places], dim=-1)
        return join(own @ v_BMRTD + others @ self._means(v_BMRTD, grid), grid, self._cell(grid))

    def _means(self, x_BMRTD: Tensor, grid: Grid) -> Tensor:
        """(B, M, R, K, D): over the tokens of every child of the ancestors of a leaf."""
        sums_BMRKD = of_ancestors(x_BMRTD.sum(3).unflatten(2, self._leaves(grid)))
        return sums_BMRKD / self._counts(grid, x_BMRTD.device).clamp_min(1)[..., None].to(x_BMRTD.dtype)

    def _counts(self, grid: Grid, device: torch.device) -> Tensor:
        """(R, K): the tokens of these nodes, none of those that complete a family."""
        tokens_R = held(grid, self._cell(grid), device).float().sum(1)
        return of_ancestors(tokens_R.view(1, 1, *self._leaves(grid), 1))[0, 0, :, :, 0]

    def _cell(self, grid: Grid) -> Cell:
        return min(self.leaf[0], grid.height), min(self.leaf[1], grid.width)

    def _leaves(self, grid: Grid) -> tuple[int, int]:
        """Rows and columns of leaves."""
        height, width = self._cell(grid)
        return -(-grid.height // height), -(-grid.width // width)


def levels(rows: int, columns: int) -> list[tuple[Cell, Cell]]:
    """From the leaves up: children along the sides of a family, and leaves along the sides of a child."""
    found, leaves = [], (1, 1)
    while (rows, columns) != (1, 1):
        family = min(2, rows), min(2, columns)
        found.append((family, leaves))
        rows, columns = -(-rows // family[0]), -(-columns // family[1])
        leaves = leaves[0] * family[0], leaves[1] * family[1]
    return found


def of_ancestors(sums_BMYXD: Tensor) -> Tensor:
    """(B, M, R, K, D): for every leaf the sums over each child of its parent, of that one's parent, and so on."""
    rows, columns = sums_BMYXD.shape[2:4]
    found = [sums_BMYXD.unsqueeze(4)[..., :0, :]]
    for (tall, broad), (height, width) in levels(rows, columns):
        whole = F.pad(sums_BMYXD, (0, 0, 0, -sums_BMYXD.shape[3] % broad, 0, -sums_BMYXD.shape[2] % tall))
        children = whole.unflatten(3, (-1, broad)).unflatten(2, (-1, tall)).transpose(3, 4).flatten(4, 5)
        each = children[:, :, :, None, :, None].expand(-1, -1, -1, height * tall, -1, width * broad, -1, -1)
        found.append(each.flatten(4, 5).flatten(2, 3)[:, :, :rows, :columns])
        sums_BMYXD = children.sum(4)
    return torch.cat(found, dim=4).flatten(2, 3)


def own_children(rows: int, columns: int, device: torch.device) -> Tensor:
    """(R, K): which of these nodes hold the leaf itself."""
    y, x = torch.arange(rows, device=device)[:, None, None], torch.arange(columns, device=device)[:, None]
    found = [torch.zeros(rows, columns, 0, dtype=torch.bool, device=device)]
    for (tall, broad), (height, width) in levels(rows, columns):
        own = y // height % tall * broad + x // width % broad
        found.append(own == torch.arange(tall * broad, device=device))
    return torch.cat(found, dim=2).flatten(0, 1)
