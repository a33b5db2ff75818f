"""Halo attention: softmax attention of blocks to their surroundings, with relative logits that depend on the query.

Source: HaloNet, Vaswani et al., CVPR 2021, arXiv:2103.12731, section 3; the relative logits: Stand-Alone
Self-Attention, Ramachandran et al., NeurIPS 2019, arXiv:1906.05909. For query i and key j of a block and its window,
    o_i = Σ_j softmax_j(q_i k_j / √D + q_i (r^h_{y_j − y_i} + r^w_{x_j − x_i})) v_j,
with a table of vectors of each axis, shared by the heads. timm and its weights leave them unscaled, as here; the paper
scales them too (`scale_position`). timm's module has no output projection, and no bias in the projection.
Where a block of a ResNet halves the map, the queries are those of every other row and column, if these divide the
blocks, and give the smaller map; y_i and x_i are then counted on that, as in timm.
Shapes: B = blocks of all images, M = heads, D = channels per head, N = queries of a block, S = keys of its window,
w = side of that window; a table is (2w − 1, D).
"""

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window_attention import added_to_logits
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Refused, Runs, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SURROUNDING
from models.attention.contract.options import check_flags
from models.attention.layouts.halo import Halo, strided
from models.attention.layouts.halo import halo as halos
from models.attention.multihead import Core


def halo_attention(
    site: Site,
    *,
    block: int | Sequence[int] = 8,
    halo: int = 3,
    mask_padding: bool = False,
    scale_position: bool = False,
    **composition: Unpack[Composition],
) -> Mixer:
    """Attention in the layout `halo` with relative logits.

    Args:
        site: the place in the backbone.
        block, halo, mask_padding: see `models.attention.layouts.halo.halo`.
        scale_position: the relative logits are scaled by D^-0.5 too, as in the paper.
        composition: other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        Refused: another layout.
    """
    check_flags("halo", scale_position=scale_position)
    if composition.get("layout") is not None:
        raise Refused(
            "the relative logits of halo attention are made for its own layout",
            "leave out attention/layout, or choose attention=softmax attention/layout=halo",
        )
    dim, bare = head_channels(site), not any(map(composition.get, ("transform", "value")))

    def layout(place: Site) -> Halo:
        blocks = halos(place, block=block, halo=halo, mask_padding=mask_padding)
        return strided(blocks, site.stride) if bare else blocks

    return assemble(site, lambda _, __, keys: HaloCore(dim, keys, scale_position), **composition | {"layout": layout})


class RelativeVectors(nn.Module):
    """A vector for every offset along each axis: `(q_BMND, grid, kv_grid) -> logits (B, M, N, S)`."""

    def __init__(self, head_dim: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.height, self.width = (nn.Parameter(torch.empty(2 * side - 1, head_dim)) for side in window)
        for table in (self.height, self.width):
            nn.init.normal_(table, std=head_dim**-0.5)

    def forward(self, q_BMND: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        return self.logits(q_BMND, grid, kv_grid, self.height, self.width)

    @staticmethod
    def logits(q_BMND: Tensor, grid: Grid, kv_grid: Grid, height: Tensor, width: Tensor) -> Tensor:
        """With these tables, of the map of the keys."""
        map_BMHWD = q_BMND.unflatten(2, grid[:2])
        rows = torch.einsum("bmhwd,hyd->bmhwy", map_BMHWD, _by_place(height, grid.height, kv_grid.height))
        columns = torch.einsum("bmhwd,wxd->bmhwx", map_BMHWD, _by_place(width, grid.width, kv_grid.width))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


class HaloCore(Core):
    """`softmax(s q kᵀ + q r) v` with vectors r by the offset of the key in its window and the query in its block.

    Args:
        head_dim: channels per head D.
        window: the map of the keys.
        scale_position: whether q r is scaled by s = D^-0.5 as well.
    """

    keys = frozenset({SURROUNDING})
    masks = True
    places = True
    row_stochastic = True
    vectors = RelativeVectors

    def __init__(self, head_dim: int, window: Grid, scale_position: bool = False) -> None:
        super().__init__()
        self.scale, self.scale_position = head_dim**-0.5, scale_position
        self.position = self.vectors(head_dim, tuple(window[:2]))

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `Core`."""
        return Runs("scaled_dot_product_attention", False, "with the relative logits of each query as a dense mask")

    def forward(
        self,
        q_BMND: Tensor,
        k_BMSD: Tensor,
        v_BMSD: Tensor,
        grid: Grid,
        kv_grid: Grid,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        added = self._added(q_BMND, grid, kv_grid, mask)
        return F.scaled_dot_product_attention(q_BMND, k_BMSD, v_BMSD, added, scale=self.scale)

    def matrix(
        self,
        q_BMND: Tensor,
        k_BMSD: Tensor,
        grid: Grid,
        kv_grid: Grid,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """The attention weights (B, M, N, S)."""
        return (q_BMND @ k_BMSD.mT * self.scale + self._added(q_BMND, grid, kv_grid, mask)).softmax(-1)

    def _added(self, q: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None) -> Tensor:
        """Relative logits and mask, (B, M, N, S)."""
        logits = self.position(q * self.scale if self.scale_position else q, grid, kv_grid)
        closed = added_to_logits(q, None, mask)
        return logits if closed is None else logits + closed


def _by_place(table: Tensor, queries: int, keys: int) -> Tensor:
    """(queries, keys, D): of the place of a key in the window less that of a query in the block."""
    at = torch.arange(keys, device=table.device) - torch.arange(queries, device=table.device)[:, None]
    return table[at + (len(table) - 1) // 2]
