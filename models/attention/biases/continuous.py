"""Continuous position bias: an MLP from the offset of query and key, log-spaced, to one number per head.

Source: Swin Transformer V2, Liu et al., CVPR 2022, arXiv:2111.09883, section 3.3; measured in the map of the weights'
training: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132.
Shapes: M = heads, N = queries, S = keys, H W = map, Y X = map of keys.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.attention.contract import Grid, Site
from models.attention.contract.places import OfOffset


def continuous(
    site: Site, *, pretrain_size: int | Sequence[int] | None = None, hidden: int = 512
) -> "ContinuousPositionBias":
    """A bias by an MLP of offsets.

    Args:
        site: the place in the backbone, with the map that the core sees.
        pretrain_size: height and width of the map that distances are measured in; None for what the site says.
        hidden: hidden channels of the MLP.

    Raises:
        ValueError: numbers that are none.
    """
    values.whole("continuous", "hidden", hidden, fix="set attention.bias.hidden")
    size = measured_in(site, pretrain_size, "continuous")
    return ContinuousPositionBias(site.num_heads, size, hidden)


class ContinuousPositionBias(OfOffset):
    """An MLP from the offset of two tokens to one number per head: (M, N, S) for a map of queries and one of keys.

    The keys may be a pooled map: each stands at the mean position of the cells that adaptive pooling gives it. Offsets
    are measured in units of `pretrain_size`, 8 from one end to the other, and log-spaced.
    """

    def __init__(self, num_heads: int, pretrain_size: tuple[int, int], hidden: int) -> None:
        super().__init__()
        self.pretrain_size = tuple(pretrain_size)
        self.cpb_fc1 = nn.Linear(2, hidden)
        self.cpb_fc2 = nn.Linear(hidden, num_heads)

    def forward(self, grid: Grid, kv_grid: Grid | None = None) -> Tensor:
        """The bias of the map `grid` for keys of the map `kv_grid`, the same one when None."""
        sides = tuple(zip(grid[:2], (kv_grid or grid)[:2], strict=True))
        table = self.coordinates(*sides, self.cpb_fc1.weight.device).to(self.cpb_fc1.weight.dtype)
        table_YXM = self.cpb_fc2(F.relu(self.cpb_fc1(table)))
        if all(side % keys == 0 for side, keys in sides):
            # sliding windows over the table of offsets: no index of N·S entries, and a cheap backward pass
            (height, rows), (width, columns) = sides
            windows = table_YXM.unfold(0, height, height // rows).unfold(1, width, width // columns)
            bias_MHWYX = windows.flip(0, 1).permute(2, 3, 4, 0, 1)
        else:
            for axis, (side, keys) in enumerate(sides):
                table_YXM = table_YXM.index_select(axis, _rows(side, keys, table.device).flatten())
            bias_MHWYX = table_YXM.unflatten(1, sides[1]).unflatten(0, sides[0]).permute(4, 0, 2, 1, 3)
        bias_MNS = bias_MHWYX.flatten(3).flatten(1, 2)
        if grid.prefix or (kv_grid or grid).prefix:
            bias_MNS = F.pad(bias_MNS, ((kv_grid or grid).prefix, 0, grid.prefix, 0), value=self.neutral)
        return bias_MNS

    def at(self, offsets: Tensor) -> Tensor:
        """(M, …); see `OfOffset`."""
        unit = torch.tensor([8 / max(side - 1, 1) for side in self.pretrain_size], device=offsets.device)
        spaced = _log_spaced(offsets * unit).to(self.cpb_fc1.weight.dtype)
        return self.cpb_fc2(F.relu(self.cpb_fc1(spaced))).movedim(-1, 0)

    def coordinates(self, rows: tuple[int, int], columns: tuple[int, int], device: torch.device) -> Tensor:
        """Log-spaced offsets (Y, X, 2), from the most negative to the most positive.

        Args:
            rows, columns: the sides of the maps of queries and of keys.
            device: of the result.
        """
        axes = [
            _offsets(side, keys, device) * (8 / max(trained - 1, 1))
            for (side, keys), trained in zip((rows, columns), self.pretrain_size, strict=True)
        ]
        return _log_spaced(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1))


def _log_spaced(offsets: Tensor) -> Tensor:
    return offsets.sign() * (offsets.abs() + 1).log2() / 3


def _offsets(side: int, keys: int, device: torch.device) -> Tensor:
    """All offsets along an axis of `side` queries and of `keys` pooled keys, in cells, ascending.

    Means of neighbouring cells lie on cells or halfway between two; where the pooling is even they are one cell apart.
    """
    step, last = _step(side, keys), _farthest(side, keys)
    return torch.arange(-last, last + 1, step, dtype=torch.float32, device=device) / 2


def _rows(side: int, keys: int, device: torch.device) -> Tensor:
    """For each query and key (side, keys) the place of its offset in `_offsets`."""
    key = torch.arange(keys, device=device)
    centre = key * side // keys + ((key + 1) * side + keys - 1) // keys - 1  # first and last cell, hence twice the mean
    return (2 * torch.arange(side, device=device)[:, None] - centre + _farthest(side, keys)) // _step(side, keys)


def _farthest(side: int, keys: int) -> int:
    """Half cells from the last query to the first key."""
    return 2 * (side - 1) - (-(-side // keys) - 1)


def _step(side: int, keys: int) -> int:
    """Half cells between neighbouring offsets."""
    return 2 if side % keys == 0 else 1


def measured_in(site: Site, pretrain_size: int | Sequence[int] | None, who: str = "cosine") -> tuple[int, int]:
    """The map whose distances a bias measures: as the backbone says, else of `pretrain_size`, else that of the site.

    Raises:
        ValueError: sides that are none, or another map than the backbone says.
    """
    if pretrain_size is None:
        return site.measured_in or tuple(site.grid[:2])
    size = values.pair(who, "pretrain_size", pretrain_size, fix="give the height and width of a map")
    if site.measured_in is not None and size != tuple(site.grid[:2]):
        raise UserError(
            f"attention: distances are measured as model.pretrain_size says, got {size} from the attention; "
            "set attention.pretrain_size=null"
        )
    return site.measured_in or size
