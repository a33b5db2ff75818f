"""Window attention: softmax attention inside windows of a token map, shifted or not, with a bias on offsets or without.

    o = softmax(scale · q kᵀ + bias) v      among the T = h·w cells of each window

The map is completed at bottom and right to whole windows. What completes it are cells with the query, key and value
`padding` (what the projection makes of a zero token: its bias), or zeros; they are attended to like any other, and
their own queries are dropped. A shifted map is rolled by -shift first, and pairs that were not neighbours before do not
see each other.

Source: Swin Transformer, Liu et al., ICCV 2021, arXiv:2103.14030, section 3.2 and equation 4; without shift and bias:
DaViT, Ding et al., ECCV 2022, arXiv:2204.03645, section 3.2.
Shapes: B = batch, N = H·W tokens, C = M·D channels, M = heads, D = channels per head, R = windows per image,
W = B·R, T = cells of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import windows
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.heads import merge_heads, split_heads
from kernels.precision import is_written_out
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
        heads = split_heads(to_windows(qkv_BNC, grid, window, shift, padding), 3, num_heads)
        mask_RTT = windows.shift_mask(*grid[:2], tuple(window), tuple(shift), qkv_BNC.device)
        o_WMTD = definition(*heads, bias_MTT, mask_RTT, scale=scale)
        return windows.merge(merge_heads(o_WMTD), *grid[:2], window, shift)
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"padding": padding, "bias": bias_MTT})
    head_dim = qkv_BNC.shape[2] // 3 // num_heads
    check_head_dim(WHO, head_dim)
    if grid[0] % window[0] == 0 and grid[1] % window[1] == 0:
        padding = None
    scale = head_dim**-0.5 if scale is None else scale
    return attend(qkv_BNC, padding, bias_MTT, *grid[:2], num_heads, *window, *shift, scale)


def definition(
    q_WMTD: Tensor,
    k_WMTD: Tensor,
    v_WMTD: Tensor,
    bias_MTT: Tensor | None = None,
    mask_RTT: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """`softmax(scale · q kᵀ + bias) v` of heads, (W, M, T, D), among the T cells of each of W = B·R windows.

    Without bias and mask it is attention of any queries on any keys.

    Args:
        q_WMTD, k_WMTD, v_WMTD: queries, keys and values.
        bias_MTT: added to the logits of every window; None for none.
        mask_RTT: of the R windows of a map: bool, True where a pair may attend, or numbers that are added; (W, M, T, T)
            where windows and heads differ.
        scale: of the logits; None for D^-1/2.
    """
    if is_written_out(q_WMTD, bias_MTT):
        return _written_out(q_WMTD, k_WMTD, bias_MTT, mask_RTT, scale) @ v_WMTD
    added = added_to_logits(q_WMTD, bias_MTT, mask_RTT)
    return F.scaled_dot_product_attention(q_WMTD, k_WMTD, v_WMTD, added, scale=scale)


def _written_out(
    q_WMTD: Tensor, k_WMTD: Tensor, bias_MTT: Tensor, mask_RTT: Tensor | None, scale: float | None
) -> Tensor:
    """The weights (W, M, T, T), with bias and mask added one after the other, never as one tensor of all windows."""
    scale = q_WMTD.shape[-1] ** -0.5 if scale is None else scale
    logits = (q_WMTD * scale) @ k_WMTD.mT + bias_MTT.to(q_WMTD.dtype)
    if mask_RTT is not None:
        closed = mask_RTT
        if mask_RTT.dtype == torch.bool:
            lowest = torch.finfo(logits.dtype).min
            closed = torch.zeros_like(mask_RTT, dtype=logits.dtype).masked_fill_(~mask_RTT, lowest)
        if mask_RTT.dim() == 4:
            return (logits + closed.to(logits.dtype)).softmax(-1)
        logits = (logits.unflatten(0, (-1, mask_RTT.shape[0])) + closed.to(logits.dtype)[:, None]).flatten(0, 1)
    return logits.softmax(-1)


def added_to_logits(q_WMTD: Tensor, bias_MTT: Tensor | None, mask_RTT: Tensor | None) -> Tensor | None:
    """Bias and mask together: (1, M, T, T) without a mask, (W, M, T, T) with one, None for nothing."""
    bias = None if bias_MTT is None else bias_MTT.to(q_WMTD.dtype).unsqueeze(0)
    if mask_RTT is None:
        return bias
    closed = mask_RTT
    if mask_RTT.dtype == torch.bool:
        closed = torch.zeros_like(mask_RTT, dtype=q_WMTD.dtype).masked_fill_(~mask_RTT, float("-inf"))
    closed = closed.to(q_WMTD.dtype)
    if mask_RTT.dim() == 4:
        return closed if bias is None else closed + bias
    total = closed[:, None] if bias is None else closed[:, None] + bias
    return total.repeat(q_WMTD.shape[0] // mask_RTT.shape[0], 1, 1, 1)


def to_windows(
    x_BNC: Tensor, grid: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int], padding: Tensor | None = None
) -> Tensor:
    """(B, N, C) → the windows (W, T, C) of the map, which `padding` completes, or zeros."""
    height, width = (windows.padded(size, side) for size, side in zip(grid, window, strict=False))
    if padding is None or (height, width) == tuple(grid[:2]):
        return windows.split(x_BNC, *grid[:2], window, shift)
    x_BHWC = F.pad(x_BNC.unflatten(1, grid[:2]), (0, 0, 0, width - grid[1], 0, height - grid[0]))
    outside = torch.ones(height, width, 1, dtype=torch.bool, device=x_BNC.device)
    outside[: grid[0], : grid[1]] = False
    completed_BHWC = torch.where(outside, padding.to(x_BNC.dtype), x_BHWC)
    return windows.split(completed_BHWC.flatten(1, 2), height, width, window, shift)


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
