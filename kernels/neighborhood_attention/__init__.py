"""Neighbourhood attention: softmax attention of every token to the kernel around it, dilated, strided, or plain.

    o_i = softmax_j(scale · q_i·k_j + rpb[j - i]) · v_j      over the T = kernel height · kernel width keys j of token i

Along each axis, the keys of a token are those around it in its residue class modulo the dilation; at a border of a map
the neighbourhood is moved inwards, so that every token has exactly T keys. The tokens of a block of `stride` have the
keys of the block's middle one. Even kernels lean to the left and top. Offsets j - i are counted within the class. The
map must hold kernel·dilation tokens along each axis: what completes a smaller one is the caller's (NAT's authors pad
with zeros before the projection). Fused, a value that is not finite also reaches tokens nearby that do not see it: the
keys of a tile are visited together, with weights of zero.

Source: Neighborhood Attention Transformer, Hassani et al., CVPR 2023, arXiv:2204.07143, equations 1 to 3; dilation:
DiNAT, Hassani and Shi, 2022, arXiv:2209.15001; stride: Generalized Neighborhood Attention, Hassani et al., 2025,
arXiv:2504.16922.
Shapes: B = batch, N = H·W tokens in row-major order, C = M·D channels, M = heads, D = channels per head, T = keys.
"""

import torch
from torch import Tensor

from kernels.dispatch import autocast, check_head_dim, check_neighbors, check_tensors, is_fused
from kernels.heads import merge_heads, split_heads
from kernels.neighborhood_attention.register import attend
from kernels.neighborhood_attention.rule import keys_along
from kernels.window_attention import window_attention

WHO = "neighborhood_attention"

Pair = tuple[int, int]


def neighborhood_attention(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    kernel: Pair,
    *,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    rpb: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention to neighbourhoods, (B, N, C) in the dtype of qkv.

    Neighbourhoods that are windows, of a stride as large as the kernel or a kernel as large as the map, are
    `window_attention` where they have no bias.

    Args:
        qkv_BNC: (B, N, 3C), the packed projection: queries, keys and values, each M heads × D.
        grid: (height, width) of the map; prefix tokens have no place in it.
        num_heads: heads M.
        kernel: (height, width) of the neighbourhood, in keys.
        stride: tokens (down, across) that share a neighbourhood, at most the kernel.
        dilation: distance (down, across) of the keys.
        rpb: (M, 2·height - 1, 2·width - 1) of the kernel, added to the logits by offset, key minus query, or None.
        scale: of the logits; None for D^-1/2.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a map smaller than kernel·dilation, or heads
            above 128 channels on the fused path.
    """
    _check(qkv_BNC, grid, num_heads, kernel, stride, dilation, rpb)
    if rpb is None and _are_windows(grid, kernel, stride, dilation):
        return window_attention(qkv_BNC, grid, num_heads, tuple(kernel), scale=scale, backend=backend)
    if not is_fused(WHO, backend, qkv_BNC):
        heads = split_heads(qkv_BNC, 3, num_heads)
        return merge_heads(definition(*heads, rpb, grid, kernel, stride, dilation, scale=scale))
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"rpb": rpb})
    head_dim = qkv_BNC.shape[2] // 3 // num_heads
    check_head_dim(WHO, head_dim)
    scale = head_dim**-0.5 if scale is None else scale
    return attend(qkv_BNC, rpb, *grid[:2], num_heads, *kernel, *stride, *dilation, scale)


def definition(
    q_BMND: Tensor,
    k_BMND: Tensor,
    v_BMND: Tensor,
    rpb: Tensor | None,
    grid: tuple[int, ...],
    kernel: Pair,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    *,
    scale: float | None = None,
) -> Tensor:
    """The heads o (B, M, N, D), from gathered keys: T copies of keys and values.

    Args:
        q_BMND, k_BMND, v_BMND: queries, keys and values.
        rpb: added to the logits by offset; None for none.
        grid, kernel, stride, dilation, scale: as above.
    """
    axes = [keys_along(*along, q_BMND.device) for along in zip(grid[:2], kernel, stride, dilation, strict=True)]
    k_BMNTD, v_BMNTD = (gathered(t, grid, *axes) for t in (k_BMND, v_BMND))
    scale = q_BMND.shape[-1] ** -0.5 if scale is None else scale
    logits_BMN1T = (q_BMND * scale).unsqueeze(3) @ k_BMNTD.mT
    if rpb is not None:
        logits_BMN1T = logits_BMN1T + bias_of(rpb, axes, kernel, dilation).to(q_BMND.dtype).unsqueeze(2)
    return (logits_BMN1T.softmax(-1) @ v_BMNTD).squeeze(3)


def gathered(t_BMND: Tensor, grid: tuple[int, ...], rows: Tensor, columns: Tensor) -> Tensor:
    """The tokens of a map in the cells `rows` (H, h) and `columns` (W, w) of each cell: (B, M, N, h·w, D)."""
    cells = t_BMND.unflatten(2, grid[:2]).index_select(2, rows.flatten()).index_select(3, columns.flatten())
    cells_BMHhWwD = cells.unflatten(3, columns.shape).unflatten(2, rows.shape)
    return cells_BMHhWwD.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def bias_of(rpb: Tensor, axes: list[Tensor], kernel: Pair, dilation: Pair) -> Tensor:
    """The entries of the table for the keys of each cell, (M, N, T)."""
    y_Hh, x_Ww = (
        (keys - torch.arange(len(keys), device=keys.device)[:, None]) // step + side - 1
        for keys, step, side in zip(axes, dilation, kernel, strict=True)
    )
    return rpb[:, y_Hh[:, None, :, None], x_Ww[None, :, None, :]].flatten(3, 4).flatten(1, 2)


def _are_windows(grid: tuple[int, ...], kernel: Pair, stride: Pair, dilation: Pair) -> bool:
    """Whether blocks of tokens see themselves: one block, or blocks as large as the kernel."""
    along = zip(grid[:2], kernel, stride, strict=True)
    return tuple(dilation) == (1, 1) and all(side == k or (s == k and side % k == 0) for side, k, s in along)


def _check(
    qkv: Tensor, grid: tuple[int, ...], heads: int, kernel: Pair, stride: Pair, dilation: Pair, rpb: Tensor | None
) -> None:
    check_neighbors(WHO, qkv, grid, heads)
    for name, pair in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{WHO}: {name} must be two numbers of at least 1, got {pair}; give one for each axis")
    if stride[0] > kernel[0] or stride[1] > kernel[1]:
        raise ValueError(
            f"{WHO}: stride must be at most the kernel {kernel}, got {stride}; with the same it is windows"
        )
    if kernel[0] * dilation[0] > grid[0] or kernel[1] * dilation[1] > grid[1]:
        raise ValueError(
            f"{WHO}: the map must hold kernel x dilation tokens along each axis, got {tuple(grid[:2])} for "
            f"{kernel} x {dilation}; complete it before the projection, or choose less"
        )
    sizes = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    if rpb is not None and (tuple(rpb.shape) != sizes or not rpb.is_floating_point()):
        raise ValueError(
            f"{WHO}: rpb must be {sizes} and floating, got {tuple(rpb.shape)} "
            f"{str(rpb.dtype).removeprefix('torch.')}; give one number per head and offset"
        )
