"""Rotary positions: pairs of channels of queries and keys are turned by an angle that grows with the place on the map.

Source: RoFormer: Enhanced Transformer with Rotary Position Embedding, Su et al., 2021, arXiv:2104.09864, equation 34;
on maps (half of the channels turn with the row, half with the column): EVA-02, Fang et al., 2023, arXiv:2303.11331.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head, P = pairs of channels.
Angles are cell · base^(−i / P) for pair i of an axis, pairs of neighbouring channels. Products of queries and keys then
depend on their offset alone. Prefix tokens are left as they are, but in a `sequence`, which begins or ends with them.
"""

import torch
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from kernels.precision import wide
from models.attention.contract import Grid, Refused, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.places import places

AXES, PREFIX = ("map", "sequence"), ("first", "last")


def rope(site: Site, *, base: float = 100.0, axes: str = "map", prefix: str = "first") -> "Rope":
    """Rotations of queries and keys.

    Args:
        site: the place in the backbone.
        base: the slowest pair turns once in about 2π base cells. Language models: 10000; maps: 100.
        axes: "map", rows and columns; "sequence", the number of the token in raster order, prefix tokens included.
        prefix: "first" or "last" of a sequence, although they stand in front of the map in any case.

    Raises:
        ValueError: a base below 1, other axes or places, or the last place where there is no sequence.
        Refused: channels of a head that do not divide into pairs for the axes.
    """
    values.number("rope", "base", base, 1, fix="set attention.transform.base, e.g. 100")
    values.choice("rope", "axes", axes, AXES, fix="set attention.transform.axes")
    values.choice("rope", "prefix", prefix, PREFIX, fix="set attention.transform.prefix")
    if prefix == "last" and axes != "sequence":
        raise UserError(
            f"rope: prefix=last is a place in a sequence, got axes={axes}; set attention.transform.axes=sequence"
        )
    dim, parts = head_channels(site), 4 if axes == "map" else 2
    if dim % parts:
        raise Refused(
            f"rope: {dim} channels per head do not divide into {parts}", "change model.num_heads or attention.head_dim"
        )
    return Rope(dim // parts, base, axes, prefix == "last")


class Rope(nn.Module):
    """It has no parameters."""

    def __init__(self, pairs: int, base: float, axes: str, last: bool) -> None:
        super().__init__()
        self.pairs, self.base, self.axes, self.last = pairs, base, axes, last

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        angles = self.angles(grid, grid, q_BMND.device)
        of_keys = angles if kv_grid == grid else self.angles(kv_grid, grid, q_BMND.device)
        return turned(q_BMND, angles), turned(k_BMSD, of_keys), v_BMSD

    def angles(self, grid: Grid, like: Grid, device: torch.device | None = None) -> Tensor:
        """(N, D / 2) of the tokens of a map, which stand on the cells of the map `like`."""
        frequencies = self.base ** (-torch.arange(self.pairs, device=device) / self.pairs)
        if self.axes == "sequence":
            at = places(Grid(1, grid.tokens), Grid(1, like.tokens), device)[:, 1:]
            at = at.roll(grid.prefix, 0) if self.last else at
        else:
            at = places(grid, like, device)
        angles = (at[:, :, None] * frequencies).flatten(1)
        prefix = 0 if self.axes == "sequence" else grid.prefix
        return torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])


def turned(x_BMND: Tensor, angles_NP: Tensor) -> Tensor:
    """Every pair of neighbouring channels, turned by its angle in float32."""
    first, second = wide(x_BMND).unflatten(-1, (-1, 2)).unbind(-1)
    sin, cos = angles_NP.sin(), angles_NP.cos()
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return pairs.flatten(-2).to(x_BMND.dtype)
