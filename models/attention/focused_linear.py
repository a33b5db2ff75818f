"""Focused linear attention: sharpened positive features, one D×D state per head, and a convolution that restores rank.

Source: FLatten Transformer: Vision Transformer using Focused Linear Attention, Han et al., ICCV 2023, arXiv:2308.00442:
    f(x) = ‖x‖ / ‖xᵖ‖ · xᵖ with x = (ReLU(x) + 1e-6) / softplus(scale)
    O = f(Q) (f(K)ᵀ V / N) / (f(Q) · mean f(K) + 1e-6) + DWC(V)
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head, C = M·D, H W = map.
Where the authors' code is followed beyond the paper: norms run over all C channels, not per head; the keys get a
learned position encoding; Q and K are divided by a learned scale per channel; the convolution is shared by all heads;
sums over keys are means, so that they do not grow with the map.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.depthwise_conv import LARGEST
from kernels.linear_attention import EPS, focused_features
from kernels.linear_attention import focused_definition as focused_heads
from kernels.linear_attention import focused_linear_attention as fused_focused_linear_attention
from kernels.precision import full_precision
from models.attention import Grid, Mixer, Runs, Site
from models.attention.assemble import Composition, assemble
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME, SHORTENED
from models.attention.contract.options import check_flags, check_odd
from models.attention.lepe import depthwise
from models.attention.multihead import Core
from models.layers.resizable import Resizable
from models.layers.tokens import square_side, to_map, to_tokens


def focused_linear_attention(
    site: Site,
    *,
    power: float = 3,
    kernel_size: int = 5,
    lepe: bool = False,
    **composition: Unpack[Composition],
) -> Mixer:
    """Linear attention with features raised to a power: linear in tokens.

    Args:
        site: the place in the backbone.
        power: the focusing factor p, at least 1; 1 leaves the features as they are. Paper: 3.
        kernel_size: of the depth-wise convolution of V that all heads share; odd.
        lepe: also add a 3×3 depth-wise convolution of V with its own weights per channel (CSWin).
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        ValueError: a power below 1, an even kernel, or both sr_ratio and kv_pool.
    """
    who = "focused_linear_attention"
    values.number(who, "power", power, 1, what="at least 1", fix="the paper uses 3")
    check_odd(who, kernel_size=kernel_size)
    check_flags(who, lepe=lepe)
    dim = head_channels(site)

    def core(num_heads: int, grid: Grid, kv_grid: Grid) -> FocusedLinearCore:
        return FocusedLinearCore(num_heads, dim, kv_grid, power=power, kernel_size=kernel_size, lepe=lepe)

    return assemble(site, core, **composition)


class FocusedLinearCore(Resizable, Core):
    """Focused features, the state f(K)ᵀ V, its reading by every query, and the convolution of the values.

    Features, state and quotient are computed in float32 at least, under autocast too.

    Args:
        num_heads, head_dim: M and D.
        kv_grid: the map of the keys in training; the position encoding is made for it and resized to others.
        power, kernel_size, lepe: see `focused_linear_attention`.
    """

    adds = True
    keys = frozenset({SAME, SHORTENED})  # its convolution needs one map

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        kv_grid: Grid,
        *,
        power: float = 3,
        kernel_size: int = 5,
        lepe: bool = False,
    ) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads, self.power, self.kv_grid = num_heads, power, kv_grid
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))  # no vector: it decays, as in the authors' runs
        self.positional_encoding = nn.Parameter(torch.zeros(1, kv_grid.cells, dim))
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim)
        self.lepe = depthwise(dim, 3 if lepe else 0)

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `models.attention.multihead.Core`."""
        if self.dwc.kernel_size[0] > LARGEST:
            return Runs("linear attention", False, f"the kernel goes up to {LARGEST}x{LARGEST} convolutions")
        return Runs("linear_attention", True)

    def fused(self, qkv_BNC: Tensor, grid: Grid, num_heads: int) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D); see `models.attention.multihead.Core`."""
        return fused_focused_linear_attention(
            qkv_BNC, grid, num_heads, power=self.power, scale_C=self._scale(qkv_BNC.dtype),
            position_NC=self.position(grid).transpose(1, 2).flatten(2)[0], **self._convolutions(),
        )  # fmt: skip

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        return focused_heads(
            q_BMND, k_BMSD, v_BMSD, grid, kv_grid, power=self.power, scale_C=self._scale(q_BMND.dtype),
            position_MSD=self.position(kv_grid)[0], **self._convolutions(),
        )  # fmt: skip

    def _scale(self, dtype: torch.dtype) -> Tensor:
        return F.softplus(self.scale.to(torch.promote_types(dtype, torch.float32))).flatten()

    def _convolutions(self) -> dict[str, Tensor | None]:
        lepe_weight, lepe_bias = (None, None) if self.lepe is None else (self.lepe.weight, self.lepe.bias)
        return {
            "weight": self.dwc.weight,
            "bias": self.dwc.bias,
            "lepe_weight": lepe_weight,
            "lepe_bias": lepe_bias,
        }

    def position(self, kv_grid: Grid) -> Tensor:
        """The encoding (1, M, S, D) of the keys, resized bicubically to another map; zero for prefix tokens."""
        table_BSC = _resized(self.positional_encoding, self.kv_grid, kv_grid)
        table_BMSD = table_BSC.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return F.pad(table_BMSD, (0, 0, kv_grid.prefix, 0)) if kv_grid.prefix else table_BMSD

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A positional encoding (1, S', C) of another square map as the one of this module; the rest stays as it is.

        Raises:
            ValueError: the other map is no square.
        """
        if name != "positional_encoding":
            return value
        side = square_side(value.shape[1], "tokens")
        return _resized(value, Grid(side, side), self.kv_grid)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S) on the values, without the convolution: quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            scale, position = self._scale(q_BMND.dtype), self.position(kv_grid)[0]
            q, k = focused_features(q_BMND, k_BMSD, self.power, scale, position)
            weights = q @ k.mT / k.shape[2]
            return weights / (weights.sum(-1, keepdim=True) + EPS)


def _resized(table_BSC: Tensor, grid: Grid, new: Grid) -> Tensor:
    """A table without prefix tokens for another map, bicubically."""
    if grid[:2] == new[:2]:
        return table_BSC
    return to_tokens(F.interpolate(to_map(table_BSC, grid._replace(prefix=0)), size=new[:2], mode="bicubic"))
