"""Window attention: softmax attention inside windows of a token map, shifted or not, with a bias on offsets or without.

    o = softmax(scale · q kᵀ + bias) v      among the T = h·w cells of each window

The map is completed at bottom and right to whole windows. What completes it are cells with the query, key and value
`padding` (what the projection makes of a zero token: its bias), or zeros; they are attended to like any other, and
their own queries are dropped. A shifted map is rolled by -shift first, and pairs that were not neighbours before do not
see each other.

Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, section 3.2 and equation 4; without shift and bias:
DaViT, Ding et al., ECCV 2022, arXiv:2204.03645, section 3.2.
Shapes: B = batch, N = H·W tokens, C = M·D channels, M = heads, R = windows per image, T = cells of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.window_attention.register import attend

WHO = "window_attention"


def window_attention(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    padding: Tensor | None = None,
    bias_MTT: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention in windows, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC: (B, N, 3C), the packed projection of the unpadded map: queries, keys and values, each M heads × D.
        grid: (height, width) of the map; windows take no prefix tokens.
        num_heads: heads M.
        window: (height, width) of the windows, in cells.
        shift: (rows, columns) by which the windows are shifted, below the window's sides.
        padding: (3C,), query, key and value of the cells that complete the map; None for zeros.
        bias_MTT: (M, T, T), added to the logits; None for none.
        scale: of the logits; None for D^-1/2.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or heads above 128 channels on the fused path.
    """
    _check(qkv_BNC, grid, num_heads, window, shift, padding, bias_MTT)
    if not is_fused(WHO, backend, qkv_BNC):
        return reference(qkv_BNC, grid, num_heads, window, shift=shift, padding=padding, bias_MTT=bias_MTT, scale=scale)
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"padding": padding, "bias": bias_MTT})
    head_dim = qkv_BNC.shape[2] // 3 // num_heads
    check_head_dim(WHO, head_dim)
    if grid[0] % window[0] == 0 and grid[1] % window[1] == 0:
        padding = None
    scale = head_dim**-0.5 if scale is None else scale
    return attend(qkv_BNC, padding, bias_MTT, *grid[:2], num_heads, *window, *shift, scale)


def reference(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    padding: Tensor | None = None,
    bias_MTT: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition in plain PyTorch."""
    qkv_WTC = to_windows(completed(qkv_BNC, grid, window, padding), window, shift)
    q, k, v = qkv_WTC.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    mask = None if bias_MTT is None else bias_MTT.to(q.dtype)[None]
    if any(shift):
        apart_RTT = apart(grid, window, shift, q.device)
        closed = torch.zeros_like(apart_RTT, dtype=q.dtype).masked_fill_(apart_RTT, float("-inf"))[:, None]
        mask = (closed if mask is None else closed + mask).repeat(len(qkv_BNC), 1, 1, 1)
    o_WMTD = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return from_windows(o_WMTD.transpose(1, 2).flatten(2), grid, window, shift)


def completed(x_BNC: Tensor, grid: tuple[int, ...], window: tuple[int, int], padding: Tensor | None) -> Tensor:
    """(B, N, C) → the map (B, H', W', C) of whole windows."""
    below, right = (-size % side for size, side in zip(grid, window, strict=False))
    x_BHWC = x_BNC.unflatten(1, grid[:2])
    if not below and not right:
        return x_BHWC
    y_BHWC = F.pad(x_BHWC, (0, 0, 0, right, 0, below))
    if padding is None:
        return y_BHWC
    outside = torch.ones(*y_BHWC.shape[1:3], 1, dtype=torch.bool, device=y_BHWC.device)
    outside[: grid[0], : grid[1]] = False
    return torch.where(outside, padding.to(x_BNC.dtype), y_BHWC)


def to_windows(x_BHWC: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """The map (B, H', W', C) → windows (B·R, T, C)."""
    x = x_BHWC.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x_BHWC
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def from_windows(x_WTC: Tensor, grid: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Windows (B·R, T, C) → (B, N, C), without the cells that complete the map."""
    down, across = (-(-size // side) for size, side in zip(grid, window, strict=False))
    x = x_WTC.unflatten(1, window).unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    x = x.roll(shift, (1, 2)) if any(shift) else x
    return x[:, : grid[0], : grid[1]].flatten(1, 2)


def apart(grid: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """Pairs in a shifted window that were not neighbours before the shift: bool (R, T, T)."""
    sides = [-(-size // side) * side for size, side in zip(grid, window, strict=False)]
    y, x = (torch.arange(side, device=device) >= side - s for side, s in zip(sides, shift, strict=True))
    seam_RT = to_windows((2 * y[:, None] + x)[None, ..., None], window, (0, 0))[..., 0]
    return seam_RT[:, :, None] != seam_RT[:, None, :]


def _check(
    qkv: Tensor,
    grid: tuple[int, ...],
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    padding: Tensor | None,
    bias: Tensor | None,
) -> None:
    if len(grid) > 2 and grid[2]:
        raise ValueError(f"{WHO}: windows take no prefix tokens, got {grid[2]}; pass the tokens of the map alone")
    if qkv.dim() != 3 or qkv.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{WHO}: qkv must be (B, {grid[0]}*{grid[1]}, 3C), got {tuple(qkv.shape)}; pass the grid of this map"
        )
    if heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"{WHO}: qkv must be 3 x heads x head width wide, got {qkv.shape[2]} for {heads} heads; project to 3C"
        )
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"{WHO}: window must be (height, width) of at least 1, got {window}; give its sides in cells")
    if len(shift) != 2 or not all(0 <= s < side for s, side in zip(shift, window, strict=True)):
        raise ValueError(f"{WHO}: shift must be from 0 to below the window {window}, got {shift}; half of it is usual")
    if padding is not None and tuple(padding.shape) != (qkv.shape[2],):
        raise ValueError(
            f"{WHO}: padding must be ({qkv.shape[2]},), got {tuple(padding.shape)}; give the bias of the projection"
        )
    T = window[0] * window[1]
    if bias is not None and tuple(bias.shape) != (heads, T, T):
        raise ValueError(f"{WHO}: bias must be ({heads}, {T}, {T}), got {tuple(bias.shape)}; give one number per pair")
