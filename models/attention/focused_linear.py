"""Focused linear attention: sharpened positive features, one D×D state per head, and a convolution that restores rank.

Source: FLatten Transformer: Vision Transformer using Focused Linear Attention, Han et al., ICCV 2023, arXiv:2308.00442:
    f(x) = ‖x‖ / ‖xᵖ‖ · xᵖ with x = (ReLU(x) + 1e-6) / softplus(scale)
    O = f(Q) (f(K)ᵀ V / N) / (f(Q) · mean f(K) + 1e-6) + DWC(V)
Shapes: B = batch, N = tokens, S = keys, M = heads, D = channels per head, C = M·D, H W = map.
Where the authors' code is followed beyond the paper: norms run over all C channels, not per head; the keys get a
learned position encoding; Q and K are divided by a learned scale per channel; the convolution is shared by all heads;
sums over keys are means, so that they do not grow with the map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.depthwise_conv import LARGEST
from kernels.linear_attention import focused_linear_attention as fused_focused_linear_attention
from kernels.precision import full_precision
from models.attention import Grid, Mixer, Runs, Site
from models.attention.heads import head_channels, heads_to_map, map_to_heads
from models.attention.lepe import depthwise
from models.attention.multihead import Core
from models.attention.options import check_flags, check_odd
from models.attention.stripes import lay_out
from models.layers.resizable import Resizable
from models.layers.tokens import square_side, to_map, to_tokens

EPS = 1e-6  # of the features and of the denominator, as in the authors' code


def focused_linear_attention(
    site: Site,
    *,
    power: float = 3,
    kernel_size: int = 5,
    window: int | Sequence[int] | None = None,
    stripe: int | str | Sequence[int | str] | None = None,
    sr_ratio: int | Sequence[int] = 1,
    kv_pool: int | None = None,
    lepe: bool = False,
    qkv_bias: bool = True,
    backend: str = "auto",
) -> Mixer:
    """Linear attention with features raised to a power: linear in tokens.

    Args:
        site: the place in the backbone.
        power: the focusing factor p, at least 1; 1 leaves the features as they are. Paper: 3.
        kernel_size: of the depth-wise convolution of V that all heads share; odd.
        window: side of the windows in tokens, cut to the map; None for the whole map.
        stripe: width of cross-shaped stripes, see `models.attention.stripes.cswin_attention`; None for none.
        sr_ratio: keys and values come from a map with sides this many times shorter (PVT); one number or one per stage.
        kv_pool: keys and values come from a map pooled to this side (PVT v2, linear: 7); None for no pooling.
        lepe: also add a 3×3 depth-wise convolution of V with its own weights per channel (CSWin).
        qkv_bias: bias of the projection.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a power below 1, an even kernel, or both sr_ratio and kv_pool.
    """
    who = "focused_linear_attention"
    values.number(who, "power", power, 1, what="at least 1", fix="the paper uses 3")
    check_odd(who, kernel_size=kernel_size)
    check_flags(who, lepe=lepe, qkv_bias=qkv_bias)
    dim = head_channels(site)

    def core(num_heads: int, grid: Grid, kv_grid: Grid) -> FocusedLinearCore:
        return FocusedLinearCore(num_heads, dim, kv_grid, power=power, kernel_size=kernel_size, lepe=lepe)

    layout = {"window": window, "stripe": stripe, "sr_ratio": sr_ratio, "kv_pool": kv_pool}
    return lay_out(site, core, **layout, qkv_bias=qkv_bias, backend=backend)


def focus(x_BMND: Tensor, power: float) -> Tensor:
    """`‖x‖ / ‖xᵖ‖ · xᵖ` over heads and channels together, for positive x: other direction, same length.

    x is divided by its largest channel first. That factor cancels, so the result is the same, but no power leaves the
    range of the number format: p = 32 or a token of 1e-6 in every channel give 0 / 0 otherwise.
    """
    peak = x_BMND.detach().amax((1, 3), keepdim=True)
    sharp = (x_BMND / peak) ** power
    return sharp * (_norm(x_BMND / peak) * peak / _norm(sharp))


def _norm(x_BMND: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_BMND, dim=(1, 3), keepdim=True)


class FocusedLinearCore(Resizable, Core):
    """Focused features, the state f(K)ᵀ V, its reading by every query, and the convolution of the values.

    Features, state and quotient are computed in float32 at least, under autocast too.

    Args:
        num_heads, head_dim: M and D.
        kv_grid: the map of the keys in training; the position encoding is made for it and resized to others.
        power, kernel_size, lepe: see `focused_linear_attention`.
    """

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
        lepe_weight, lepe_bias = (None, None) if self.lepe is None else (self.lepe.weight, self.lepe.bias)
        return fused_focused_linear_attention(
            qkv_BNC, grid, num_heads, power=self.power, scale_C=F.softplus(self.scale.float()).flatten(),
            position_NC=self.position(grid).transpose(1, 2).flatten(2)[0], weight=self.dwc.weight, bias=self.dwc.bias,
            lepe_weight=lepe_weight, lepe_bias=lepe_bias,
        )  # fmt: skip

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            q, k = self.features(q_BMND, k_BMSD, kv_grid)
            state_BMDD = k.mT @ (v_BMSD.to(k.dtype) / k.shape[2])
            x_BMND = q @ state_BMDD / (q @ k.mean(2, keepdim=True).mT + EPS)
        return x_BMND.to(v_BMSD.dtype) + self.local(v_BMSD, grid, kv_grid)

    def features(self, q_BMND: Tensor, k_BMSD: Tensor, kv_grid: Grid) -> tuple[Tensor, Tensor]:
        """f(Q) (B, M, N, D) and f(K) (B, M, S, D), in float32 at least."""
        dtype = torch.promote_types(q_BMND.dtype, torch.float32)
        scale_MD = F.softplus(self.scale.to(dtype)).view(self.num_heads, 1, -1)
        k = k_BMSD.to(dtype) + self.position(kv_grid).to(dtype)
        return tuple(focus((x.relu() + EPS) / scale_MD, self.power) for x in (q_BMND.to(dtype), k))

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

    def local(self, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The depth-wise convolutions of the values, (B, M, N, D); zero for prefix tokens.

        Shortened values are enlarged linearly along the row-major sequence, not over the map, as in the authors' code.
        """
        v_BCHW = heads_to_map(v_BMSD, kv_grid)
        if kv_grid[:2] != grid[:2]:
            sequence = F.interpolate(v_BCHW.flatten(2), size=grid.cells, mode="linear")
            v_BCHW = sequence.unflatten(2, grid[:2])
        weight, bias = self.dwc.weight.repeat(self.num_heads, 1, 1, 1), self.dwc.bias.repeat(self.num_heads)
        local_BCHW = F.conv2d(v_BCHW, weight, bias, padding=self.dwc.padding, groups=weight.shape[0])
        if self.lepe is not None:
            local_BCHW = local_BCHW + self.lepe(v_BCHW)
        return map_to_heads(local_BCHW, self.num_heads, grid.prefix)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S) on the values, without the convolution: quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            q, k = self.features(q_BMND, k_BMSD, kv_grid)
            weights = q @ k.mT / k.shape[2]
            return weights / (weights.sum(-1, keepdim=True) + EPS)


def _resized(table_BSC: Tensor, grid: Grid, new: Grid) -> Tensor:
    """A table without prefix tokens for another map, bicubically."""
    if grid[:2] == new[:2]:
        return table_BSC
    return to_tokens(F.interpolate(to_map(table_BSC, grid._replace(prefix=0)), size=new[:2], mode="bicubic"))
