"""Bi-level routing attention: the tokens of each region of a map attend to the few regions that it is routed to.

    m = mean of x over each region                                    `region_means`
    I = the K largest of scale · m_q m_kᵀ, per region                 `select_regions`, m_q and m_k projected from m
    o = softmax(scale · q k[I]ᵀ) v[I] + conv(v)                       `routed_attention`, conv depth-wise (LePE)

q, k, v are read where one projection left them, (B, N, 2 Cq + C), with N = H·W tokens in row-major order; nothing is
gathered, and there is one softmax over the keys of all K regions. Regions are numbered row by row. Where they do not
divide the map, cells of zeros complete it at the bottom and the right: their keys and values are zero and take part in
the softmax, and they are left out of the means. The routes have no gradient. Sums and softmax are float32.

Source: BiFormer, Zhu et al., CVPR 2023, arXiv:2303.08810, section 3.2, equations 2 to 6. The scale, of all channels
together and not of one head, and the zero cells are those of the authors' code (NCHW version).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import depthwise_conv as conv
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.routed_attention.register import attend, means_op, regions_of, selection_op

WHO = "routed_attention"
MOST_REGIONS = 65535
MOST_SELECTED_FROM = 1024


def routed_attention(
    qkv_BNC: Tensor,
    routes_BRK: Tensor,
    grid: tuple[int, ...],
    region: tuple[int, int],
    num_heads: int,
    *,
    qk_dim: int | None = None,
    scale: float | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each region to its routed regions, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC: queries, keys and values as one projection gives them, (B, N, 2 qk_dim + C); heads are slices of each.
        routes_BRK: integers (B, R, K): the different regions that each region attends to, in any order, all of them
            between 0 and R - 1 (not checked, as that would wait for the device).
        grid: (height, width) of the map.
        region: (height, width) of a region, in cells.
        num_heads: heads.
        qk_dim: channels of all queries of a token; C, a third of the projection, without it.
        scale: of the logits; qk_dim ** -0.5 without it.
        lepe_weight: (C, 1, k, k), k odd: the depth-wise convolution of the values on the map is added; None for none.
        lepe_bias: (C,), or None.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; on the fused path heads wider than 128 channels,
            more than 65535 regions, or a convolution wider than 7.
    """
    qk_dim = qkv_BNC.shape[-1] // 3 if qk_dim is None else qk_dim
    _check(qkv_BNC, routes_BRK, grid, region, num_heads, qk_dim, lepe_weight, lepe_bias)
    if not is_fused(WHO, backend, qkv_BNC):
        return reference(
            qkv_BNC, routes_BRK, grid, region, num_heads, qk_dim=qk_dim, scale=scale,
            lepe_weight=lepe_weight, lepe_bias=lepe_bias,
        )  # fmt: skip
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"routes": routes_BRK, "lepe_weight": lepe_weight, "lepe_bias": lepe_bias})
    _check_fused(qkv_BNC, routes_BRK, num_heads, qk_dim, lepe_weight)
    return attend(qkv_BNC, lepe_weight, lepe_bias, routes_BRK.long(), *grid[:2], *region, num_heads, qk_dim, scale)


def region_means(x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """Mean token of each region over the cells that lie on the map, (B, R, C) in float32, without gradient.

    One pass over x; in float32 under autocast too, because rounded means choose other regions.

    Raises:
        ValueError: x is not the map of this grid, or no dtype that the kernels take.
    """
    who = "region_means"
    _check_map(who, x_BNC, grid, region)
    x_BNC = x_BNC.detach()
    if not is_fused(who, backend, x_BNC):
        return reference_means(x_BNC, grid, region)
    check_tensors(who, {"x": x_BNC})
    return means_op(x_BNC, *grid[:2], *region)


def select_regions(q_BRC: Tensor, k_BRC: Tensor, topk: int, scale: float, *, backend: str = "auto") -> Tensor:
    """The `topk` regions of highest affinity `scale · q kᵀ` for each region, int64 (B, R, topk), without gradient.

    Best first, ties to the lowest index, as a stable descending sort gives them; in float32 whatever the precision of
    matrix products is set to.

    Raises:
        ValueError: q and k are not shaped alike, topk is not between 1 and R, or R is above 1024 on the fused path.
    """
    who = "select_regions"
    if q_BRC.dim() != 3 or q_BRC.shape != k_BRC.shape or q_BRC.device != k_BRC.device:
        raise ValueError(
            f"{who}: q and k must both be (B, R, C) on one device, got {tuple(q_BRC.shape)} on {q_BRC.device} and "
            f"{tuple(k_BRC.shape)} on {k_BRC.device}; pass the mean query and key of each region"
        )
    R = q_BRC.shape[1]
    if not 1 <= topk <= R:
        raise ValueError(f"{who}: topk must be from 1 to the {R} regions, got {topk}; lower it, or use more regions")
    q_BRC, k_BRC = q_BRC.detach(), k_BRC.detach()
    if not is_fused(who, backend, q_BRC):
        return reference_selection(q_BRC, k_BRC, topk, scale)
    if R > MOST_SELECTED_FROM:
        raise ValueError(f"{who}: the kernel takes at most {MOST_SELECTED_FROM} regions, got {R}; use backend=torch")
    return selection_op(q_BRC.float(), k_BRC.float(), topk, scale)


def reference(
    qkv_BNC: Tensor,
    routes_BRK: Tensor,
    grid: tuple[int, ...],
    region: tuple[int, int],
    num_heads: int,
    *,
    qk_dim: int | None = None,
    scale: float | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
) -> Tensor:
    """The definition in plain PyTorch.

    Whole regions are selected as rows: the gradient of `torch.gather` would need R times the memory.
    """
    qk_dim = qkv_BNC.shape[-1] // 3 if qk_dim is None else qk_dim
    scale = qk_dim**-0.5 if scale is None else scale
    q_BNC, kv_BNC = qkv_BNC.split([qk_dim, qkv_BNC.shape[-1] - qk_dim], -1)
    q_WTC, kv_WTC = (to_regions(t, grid, region) for t in (q_BNC, kv_BNC))
    B, R, K = routes_BRK.shape
    chosen = routes_BRK + R * torch.arange(B, device=routes_BRK.device).view(B, 1, 1)
    kv_WSC = kv_WTC.index_select(0, chosen.flatten()).view(B * R, K * kv_WTC.shape[1], kv_WTC.shape[2])
    k_WSC, v_WSC = kv_WSC.split([qk_dim, kv_WSC.shape[-1] - qk_dim], -1)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q_WTC, k_WSC, v_WSC))
    o_WTC = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    o_BNC = from_regions(o_WTC, grid, region)
    if lepe_weight is None:
        return o_BNC
    return conv.reference(qkv_BNC[..., 2 * qk_dim :], grid[:2], lepe_weight, lepe_bias, residual=o_BNC)


def reference_means(x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int]) -> Tensor:
    """Means of regions in plain PyTorch."""
    x_BCHW = x_BNC.detach().float().unflatten(1, grid[:2]).permute(0, 3, 1, 2)
    mean_BCHW = F.avg_pool2d(x_BCHW, region, ceil_mode=True, count_include_pad=False)
    return mean_BCHW.flatten(2).transpose(1, 2).contiguous()


def reference_selection(q_BRC: Tensor, k_BRC: Tensor, topk: int, scale: float) -> Tensor:
    """Selection in plain PyTorch; the order of ties in `torch.topk` is unspecified."""
    with torch.autocast(q_BRC.device.type, enabled=False):
        affinity_BRR = (q_BRC.detach().float() * scale) @ k_BRC.detach().float().mT
    return affinity_BRR.sort(dim=-1, descending=True, stable=True).indices[..., :topk].contiguous()


def to_regions(x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int]) -> Tensor:
    """(B, N, C) → (B·R, T, C), completed with zeros."""
    (rows, columns), (h, w) = regions_of(grid, region), region
    x = x_BNC.unflatten(1, grid[:2])
    if (rows * h, columns * w) != tuple(grid[:2]):
        x = F.pad(x, (0, 0, 0, columns * w - grid[1], 0, rows * h - grid[0]))
    return x.unflatten(2, (columns, w)).unflatten(1, (rows, h)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_regions(x_WTC: Tensor, grid: tuple[int, ...], region: tuple[int, int]) -> Tensor:
    """The inverse of `to_regions`, without what it added."""
    rows, columns = regions_of(grid, region)
    x = x_WTC.unflatten(1, region).unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1]].flatten(1, 2)


def _check_map(who: str, x: Tensor, grid: tuple[int, ...], region: tuple[int, int]) -> None:
    if sum(grid[2:]):
        raise ValueError(f"{who}: class tokens belong to no region, got {grid[2]} of them; take them off first")
    if min(*grid[:2], *region) < 1:
        raise ValueError(
            f"{who}: grid and region must be positive, got {tuple(grid)} and {tuple(region)}; give the sides "
            "of the map and of a region"
        )
    if x.dim() != 3 or x.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{who}: tokens must be (B, {grid[0]}*{grid[1]}, channels), got {tuple(x.shape)}; pass the grid of this map"
        )


def _check(
    qkv: Tensor,
    routes: Tensor,
    grid: tuple[int, ...],
    region: tuple[int, int],
    heads: int,
    qk_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    _check_map(WHO, qkv, grid, region)
    C = qkv.shape[2] - 2 * qk_dim
    if heads < 1 or qk_dim < 1 or C < 1 or qk_dim % heads or C % heads:
        raise ValueError(
            f"{WHO}: {heads} heads must divide queries and values of a projection (B, N, 2*qk_dim + C), got {qk_dim} "
            f"and {C} channels; set num_heads and qk_dim as in the projection"
        )
    rows, columns = regions_of(grid, region)
    if routes.dim() != 3 or routes.shape[:2] != (qkv.shape[0], rows * columns) or not routes.shape[2]:
        raise ValueError(
            f"{WHO}: routes must be ({qkv.shape[0]}, {rows}*{columns}, K), got {tuple(routes.shape)}; "
            "use select_regions"
        )
    if routes.shape[2] > rows * columns or routes.is_floating_point():
        raise ValueError(
            f"{WHO}: routes must be at most {rows * columns} different integers per region, got {routes.shape[2]} of "
            f"{str(routes.dtype).removeprefix('torch.')}; use select_regions"
        )
    if weight is not None:
        conv.check(qkv[..., 2 * qk_dim :], grid[:2], 0, weight, bias, None)
    elif bias is not None:
        raise ValueError(f"{WHO}: lepe_bias must come with lepe_weight, got no weight; give both, or none")


def _check_fused(qkv: Tensor, routes: Tensor, heads: int, qk_dim: int, weight: Tensor | None) -> None:
    check_head_dim(WHO, max(qk_dim, qkv.shape[2] - 2 * qk_dim) // heads)
    if routes.shape[1] > MOST_REGIONS:
        raise ValueError(
            f"{WHO}: the kernels take at most {MOST_REGIONS} regions, got {routes.shape[1]}; use larger ones, or "
            "backend=torch"
        )
    if weight is not None and weight.shape[-1] > conv.LARGEST:
        raise ValueError(
            f"{WHO}: the kernels go up to {conv.LARGEST}x{conv.LARGEST} LePE weights, got {weight.shape[-1]}; use "
            "backend=torch"
        )
