"""Length-scaled cosine attention with a continuous relative position bias over the whole map.

Source: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, which has it in its last stage; the bias by an MLP of log-spaced
coordinates is from Swin Transformer V2, Liu et al., CVPR 2022, arXiv:2111.09883. With S keys,
    o = softmax(τ log(S) (q/‖q‖ + e) (k/‖k‖)ᵀ + bias(Δy, Δx)) v.

Shapes: B = batch, N = tokens, S = keys, C = channels, M = heads, D = channels per head, H W = map, Y X = map of keys.
"""

import math
from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from kernels.precision import full_precision
from kernels.window_attention import added_to_logits
from models.attention.assemble import Composition, assemble
from models.attention.contract import Accepts, Grid, Mixer, Runs, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME, SHORTENED
from models.attention.contract.options import check_whole
from models.attention.multihead import Core

# Far below the norm of any query in use. The authors' 1e-12 lets the gradient at an all-zero token reach 1e12.
EPSILON = 1e-6


def cosine_attention(
    site: Site,
    *,
    pretrain_size: int | Sequence[int] | None = None,
    hidden: int = 512,
    head_dim: int | None = None,
    **composition: Unpack[Composition],
) -> Mixer:
    """Cosine attention over the map; prefix tokens are refused, since they have no position.

    Args:
        site: the place in the backbone.
        pretrain_size: height and width of the map that distances are measured in: that of the weights' training, so
            that the same offset keeps its coordinate on a larger map. None for what the site says.
        hidden: hidden channels of the MLP of the bias.
        head_dim: channels per head D; C / M by default.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    check_whole("cosine", hidden=hidden, head_dim=1 if head_dim is None else head_dim)
    size = measured_in(site, pretrain_size)
    dim = head_dim or head_channels(site)
    accepts = Accepts(prefix="refused")
    return assemble(
        site, lambda heads, *_: CosineCore(heads, dim, size, hidden), head_dim=dim, accepts=accepts, **composition
    )


class CosineCore(Core):
    """`softmax(τ log(S) (q̂ + e) k̂ᵀ + bias) v`; normalisation and scale in float32.

    τ = softplus(temperature) starts at 1 / 0.24; e, the query embedding, is one vector per head.
    """

    keys = frozenset({SAME, SHORTENED})
    masks = True
    row_stochastic = True

    def __init__(self, num_heads: int, head_dim: int, pretrain_size: tuple[int, int], hidden: int = 512) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.bias = ContinuousPositionBias(num_heads, pretrain_size, hidden)

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `Core`."""
        return Runs("scaled_dot_product_attention", False, "dense attention with a bias is PyTorch's own fused kernel")

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None
    ) -> Tensor:
        q, k, bias = (t.to(v_BMSD.dtype) for t in self._logit_terms(q_BMND, k_BMSD, grid, kv_grid))
        return F.scaled_dot_product_attention(q, k, v_BMSD, added_to_logits(q, bias, mask), scale=1.0)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None) -> Tensor:
        """The attention weights (B, M, N, S)."""
        q, k, bias = self._logit_terms(q_BMND, k_BMSD, grid, kv_grid)
        return (q @ k.mT + added_to_logits(q, bias, mask)).softmax(-1)

    def _logit_terms(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, unit keys and bias (M, N, S), in float32: the logits are q kᵀ + bias."""
        q, k = (F.normalize(t.float(), dim=-1, eps=EPSILON) for t in (q_BMND, k_BMSD))
        scale = F.softplus(self.temperature.float()) * math.log(k.shape[2])
        with full_precision(q.device):
            bias = self.bias(grid, kv_grid).float()
        return (q + self.query_embedding.float()) * scale, k, bias


class ContinuousPositionBias(nn.Module):
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
        return bias_MHWYX.flatten(3).flatten(1, 2)

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
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
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


def measured_in(site: Site, pretrain_size: int | Sequence[int] | None) -> tuple[int, int]:
    """The map whose distances a bias measures: as the backbone says, else of `pretrain_size`, else that of the site.

    Raises:
        ValueError: sides that are none, or another map than the backbone says.
    """
    if pretrain_size is None:
        return site.measured_in or tuple(site.grid[:2])
    size = values.pair("cosine", "pretrain_size", pretrain_size, fix="give the height and width of a map")
    if site.measured_in is not None and size != tuple(site.grid[:2]):
        raise UserError(
            f"attention: distances are measured as model.pretrain_size says, got {size} from the attention; "
            "set attention.pretrain_size=null"
        )
    return site.measured_in or size
