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
from kernels import windows
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused, is_transformed
from kernels.heads import merge_heads, split_heads, to_map, to_tokens
from kernels.order import sorted_stably
from kernels.precision import full_precision, wide
from kernels.routed_attention.register import attend, means_op, regions_of, selection_op

WHO = "routed_attention"
MOST_REGIONS = 65535
MOST_SELECTED_FROM = 1024
MOST_MASKED = 1024  # tokens of a map whose pairs may all be masked


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
            between 0 and R - 1. On a GPU this is not checked, as that would wait for it; what comes out of other
            routes there is undefined.
        grid: (height, width) of the map.
        region: (height, width) of a region, in cells.
        num_heads: heads.
        qk_dim: channels of all queries of a token; C, a third of the projection, without it.
        scale: of the logits; qk_dim ** -0.5 without it.
        lepe_weight: (C, 1, k, k), k odd: the depth-wise convolution of the values on the map is added; None for none.
        lepe_bias: (C,), or None.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; a region that is listed twice, outside of a
            GPU and of tracing; on the fused path heads wider than 128 channels, more than 65535 regions, or a
            convolution wider than 7.
    """
    qk_dim = qkv_BNC.shape[-1] // 3 if qk_dim is None else qk_dim
    _check(qkv_BNC, routes_BRK, grid, region, num_heads, qk_dim, lepe_weight, lepe_bias)
    if not is_fused(WHO, backend, qkv_BNC):
        q, k, v = qkv_BNC.split([qk_dim, qk_dim, qkv_BNC.shape[-1] - 2 * qk_dim], -1)
        q_WTC, k_WTC, v_WTC = (windows.split(t, *grid[:2], region) for t in (q, k, v))
        scale = qk_dim**-0.5 if scale is None else scale
        o_WTC = definition(q_WTC, k_WTC, v_WTC, routes_BRK, num_heads, scale=scale)
        o_BNC = windows.merge(o_WTC, *grid[:2], region)
        return o_BNC if lepe_weight is None else conv.definition(v, grid[:2], lepe_weight, lepe_bias, residual=o_BNC)
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"routes": routes_BRK, "lepe_weight": lepe_weight, "lepe_bias": lepe_bias})
    _check_fused(qkv_BNC, routes_BRK, num_heads, qk_dim, lepe_weight)
    return attend(qkv_BNC, lepe_weight, lepe_bias, routes_BRK.long(), *grid[:2], *region, num_heads, qk_dim, scale)


def region_means(x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """Mean token of each region over the cells that lie on the map, (B, R, C) in float32 at least, without gradient.

    One pass over x; in float32 under autocast too, because rounded means choose other regions.

    Raises:
        ValueError: x is not the map of this grid, or no dtype that the kernels take.
    """
    who = "region_means"
    _check_map(who, x_BNC, grid, region)
    x_BNC = x_BNC.detach()
    if not is_fused(who, backend, x_BNC):
        return means(wide(x_BNC), grid, region).contiguous()
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
        return ranked(q_BRC, k_BRC, topk, scale)[0].contiguous()
    if R > MOST_SELECTED_FROM:
        raise ValueError(f"{who}: the kernel takes at most {MOST_SELECTED_FROM} regions, got {R}; use backend=torch")
    return selection_op(q_BRC.float(), k_BRC.float(), topk, scale)


def definition(
    q_WTC: Tensor,
    k_WSC: Tensor,
    v_WSC: Tensor,
    routes_BRK: Tensor,
    num_heads: int,
    *,
    scale: float,
    weights_BRK: Tensor | None = None,
) -> Tensor:
    """`softmax(scale · q k[I]ᵀ) v[I]` of all heads of W = B·R regions, (W, T, C).

    Args:
        q_WTC, k_WSC, v_WSC: queries, keys and values of each region, M heads next to each other; S = T, or fewer keys.
        routes_BRK: the regions I that each region attends to.
        num_heads: M.
        scale: of the logits.
        weights_BRK: factors of the keys and values of each region in I (the authors' soft routing); None for none.
    """
    if weights_BRK is None and _mostly_open(routes_BRK, q_WTC):
        return _masked(q_WTC, k_WSC, v_WSC, routes_BRK, num_heads, scale)
    # keys and values apart: the gradient of a split behind the gather would be a copy of all of them
    parts = q_WTC, gathered(k_WSC, routes_BRK, weights_BRK), gathered(v_WSC, routes_BRK, weights_BRK)
    (q,), (k,), (v,) = (split_heads(t, 1, num_heads) for t in parts)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=scale))


def _mostly_open(routes_BRK: Tensor, q_WTC: Tensor) -> bool:
    """Whether attention of all tokens takes less time than K copies of every region: measured on a CPU.

    With a third of the regions, and a mask, it is 4 times as fast there; all of them need no mask.
    """
    _, R, K = routes_BRK.shape
    return K == R or (q_WTC.device.type == "cpu" and R <= 4 * K and R * q_WTC.shape[1] <= MOST_MASKED)


def _masked(q_WTC: Tensor, k_WSC: Tensor, v_WSC: Tensor, routes_BRK: Tensor, num_heads: int, scale: float) -> Tensor:
    """What `definition` computes, region by region as it comes, with -inf for the pairs that no route joins."""
    (B, R, K), T, S = routes_BRK.shape, q_WTC.shape[1], k_WSC.shape[1]
    maps = (t.reshape(B, R * t.shape[1], t.shape[2]) for t in (q_WTC, k_WSC, v_WSC))
    (q,), (k,), (v,) = (split_heads(t_BNC, 1, num_heads) for t_BNC in maps)
    mask = None
    if K < R:
        closed = torch.full((B, R, R), float("-inf"), dtype=q.dtype, device=q.device).scatter(-1, routes_BRK, 0.0)
        mask = closed[:, None, :, None, :, None].expand(B, 1, R, T, R, S).reshape(B, 1, R * T, R * S)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, mask, scale=scale)).reshape(B * R, T, v_WSC.shape[2])


def gathered(x_WSC: Tensor, routes_BRK: Tensor, weights_BRK: Tensor | None = None) -> Tensor:
    """(B·R, S, C) → (B·R, K·S, C): the keys or values of the regions that each region is routed to.

    Whole rows are selected: the backward pass of `torch.gather` on an expanded tensor would allocate R times the map.
    """
    B, R, K = routes_BRK.shape
    rows = routes_BRK + R * torch.arange(B, device=routes_BRK.device).view(B, 1, 1)
    picked = x_WSC.index_select(0, rows.flatten())
    if weights_BRK is not None:
        picked = picked * weights_BRK.to(picked.dtype).reshape(-1, 1, 1)
    return picked.view(B * R, K * x_WSC.shape[1], x_WSC.shape[2])


def means(x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int]) -> Tensor:
    """Mean token of each region over the cells that lie on the map, (B, R, C)."""
    return to_tokens(F.avg_pool2d(to_map(x_BNC, grid), region, ceil_mode=True, count_include_pad=False))


def ranked(q_BRC: Tensor, k_BRC: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """The `topk` regions of highest affinity for each region, best first, and these affinities, (B, R, topk).

    A stable sort, because the order of ties in `torch.topk` is unspecified and differs between devices.
    """
    with full_precision(q_BRC.device):
        affinity_BRR = (wide(q_BRC) * scale) @ wide(k_BRC).mT
    best = sorted_stably(affinity_BRR, descending=True)
    return best.indices[..., :topk], best.values[..., :topk]


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
    _check_different(routes)
    if weight is not None:
        conv.check(qkv[..., 2 * qk_dim :], grid[:2], 0, weight, bias, None)
    elif bias is not None:
        raise ValueError(f"{WHO}: lepe_bias must come with lepe_weight, got no weight; give both, or none")


def _check_different(routes: Tensor) -> None:
    """Refuses a region that another is routed to twice, where the numbers are at hand."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(routes) is not Tensor
    if routes.device.type != "cpu" or routes.shape[2] == 1 or traced or is_transformed(routes):
        return
    ordered = routes.detach().sort(-1).values
    same = ordered[..., 1:] == ordered[..., :-1]
    if same.any():
        raise ValueError(
            f"{WHO}: routes must be different regions, got {ordered[..., 1:][same][0].item()} twice for one region; "
            "use select_regions"
        )


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
