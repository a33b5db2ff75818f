"""Softmax attention: over the whole map or a shortened one, or in windows, shifted and with relative position bias.

Source: Attention Is All You Need, Vaswani et al., 2017, arXiv:1706.03762, equation 1; windows, shift and bias: Swin
Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, equation 4.
Shapes: B = batch, N = tokens, S = keys, C = channels, M = heads, D = channels per head, R = windows, T = their tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.moh_attention import moh_attention
from kernels.window_attention import added_to_logits, window_attention
from kernels.window_attention import definition as softmax_heads
from models.attention import Grid, Refused, Runs, Site
from models.attention.contract.heads import head_channels, heads_to_map, map_to_heads
from models.attention.contract.options import check_flags, check_whole, ratio_of, window_of
from models.attention.lepe import depthwise
from models.attention.multihead import Core, MultiHead, reduction
from models.layers.resizable import Resizable
from models.layers.tokens import square_side


def softmax_attention(
    site: Site,
    *,
    window: int | tuple[int, int] | None = None,
    shift: bool = False,
    relative_position_bias: bool = False,
    stored_mask: bool = False,
    qkv_bias: bool = True,
    qk_norm: bool = False,
    head_dim: int | None = None,
    sr_ratio: int | Sequence[int] = 1,
    kv_pool: int | None = None,
    backend: str = "auto",
) -> MultiHead:
    """Scaled dot-product attention, `softmax(q kᵀ / √D) v`, with whichever backend PyTorch finds fastest.

    Args:
        site: the place in the backbone.
        window: side of the windows in tokens, cut to the map; None attends over the whole map. Papers: 7, 12 at 384 px.
        shift: roll the windows of every second block by half a window, masking pairs that were not neighbours.
        relative_position_bias: a learned bias per head and offset inside the window.
        stored_mask: the masks of shifted windows are among the weights, see `MultiHead`.
        qkv_bias, qk_norm: bias of the projection, LayerNorm on queries and keys.
        head_dim: channels per head D; C / M by default.
        sr_ratio: keys and values come from a map with sides this many times shorter, one number or one per stage
            (PVT: 8, 4, 2, 1); a plain ViT takes the third.
        kv_pool: keys and values come from a map pooled to this side (PVT v2, linear: 7); None for no pooling.
        backend: "auto", "triton" or "torch"; over the whole map it is PyTorch's own fused kernel in any case.
    """
    flags = {"shift": shift, "relative_position_bias": relative_position_bias, "stored_mask": stored_mask}
    check_flags("softmax", **flags, qkv_bias=qkv_bias, qk_norm=qk_norm)
    check_whole("softmax", head_dim=1 if head_dim is None else head_dim)
    size, ratio = window_of(window, site.grid), ratio_of(site, sr_ratio, kv_pool)
    if size is not None and (ratio != 1 or kv_pool is not None):
        raise Refused("windows and shortened keys exclude each other", "set attention.window=null, or sr_ratio=1")
    if size is None and (shift or relative_position_bias):
        raise Refused("shift and relative_position_bias need windows", "set attention.window, or both to false")
    rolled = (0, 0)
    if shift and site.block % 2:
        # a window as large as the map has nothing to be shifted against
        rolled = tuple(w // 2 if w < side else 0 for w, side in zip(size, site.grid[:2], strict=True))
    dim = head_dim or head_channels(site)
    core = SoftmaxCore(site.num_heads, dim, size if relative_position_bias else None, qk_norm)
    reduce = reduction(site, ratio, kv_pool)
    options = {"stored_mask": stored_mask, "qkv_bias": qkv_bias, "head_dim": dim, "backend": backend}
    return MultiHead(site, core, window=size, shift=rolled, reduce=reduce, **options)


class SoftmaxCore(Core):
    """`softmax(q kᵀ / √D + bias) v` per head, and with `lepe` a 3×3 depth-wise convolution of v (CSWin) beside it."""

    finds_windows = True

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        window: tuple[int, int] | None = None,
        qk_norm: bool = False,
        lepe: bool = False,
    ) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.bias = RelativePositionBias(num_heads, window) if window else None
        dim = num_heads * head_dim
        self.lepe = depthwise(dim, 3 if lepe else 0)

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """The windows have a kernel, and so have gated heads; the rest is PyTorch's scaled_dot_product_attention."""
        if not isinstance(self.q_norm, nn.Identity):
            return Runs("scaled_dot_product_attention", False, "queries and keys are normalised first (qk_norm)")
        if self.lepe is not None:
            return Runs(
                "scaled_dot_product_attention", False, "PyTorch's own fused kernel, and a convolution beside it"
            )
        if window is not None:
            return Runs("window_attention", True)
        if gated:
            return Runs("moh_attention", True)
        return Runs("scaled_dot_product_attention", False, "dense attention is PyTorch's own fused kernel")

    def fused(
        self,
        qkv_BNC: Tensor,
        grid: Grid,
        num_heads: int,
        *,
        window: tuple[int, int] | None = None,
        shift: tuple[int, int] = (0, 0),
        padding: Tensor | None = None,
        gates: Tensor | None = None,
    ) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D); see `Core`."""
        if window is None:
            return moh_attention(qkv_BNC, gates.float(), num_heads, scale=self.scale)
        bias = None if self.bias is None else self.bias()
        layout = {"shift": shift, "padding": padding, "bias_MTT": bias, "scale": self.scale}
        return window_attention(qkv_BNC, grid[:2], num_heads, window, **layout)

    def forward(
        self, q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None
    ) -> Tensor:
        bias = None if self.bias is None else self.bias()
        o_BMND = softmax_heads(self.q_norm(q_BMND), self.k_norm(k_BMND), v_BMND, bias, mask, scale=self.scale)
        if self.lepe is None:
            return o_BMND
        return o_BMND + map_to_heads(self.lepe(heads_to_map(v_BMND, kv_grid)), v_BMND.shape[1], grid.prefix)

    def matrix(self, q_BMND: Tensor, k_BMND: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None) -> Tensor:
        """The attention weights (B, M, N, S)."""
        logits = self.q_norm(q_BMND) @ self.k_norm(k_BMND).mT * self.scale
        added = added_to_logits(q_BMND, None if self.bias is None else self.bias(), mask)
        return (logits if added is None else logits + added).softmax(-1)


class RelativePositionBias(Resizable, nn.Module):
    """One learned number per head and offset (dy, dx) inside a window; called, it gives (M, T, T)."""

    def __init__(self, num_heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        height, width = self.window = window
        self.table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        y, x = y.flatten(), x.flatten()
        offset = (y[:, None] - y[None, :] + height - 1) * (2 * width - 1) + x[:, None] - x[None, :] + width - 1
        self.register_buffer("offset", offset, persistent=False)

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A table ((2h' - 1)(2w' - 1), M) of other square windows as the one of this module, bicubically.

        Raises:
            ValueError: the other windows are no squares.
        """
        side = square_side(value.shape[0], "offsets")
        table_1MHW = value.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        new = [2 * size - 1 for size in self.window]
        return F.interpolate(table_1MHW, size=new, mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)

    def forward(self) -> Tensor:
        return self.table[self.offset].permute(2, 0, 1).contiguous()
