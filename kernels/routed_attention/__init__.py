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
from kernels.operation import Cost, Operation
from kernels.registration import define

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
    return _RoutedAttention.apply(
        qkv_BNC, lepe_weight, lepe_bias, routes_BRK.long(), *grid[:2], *region, num_heads, qk_dim, scale
    )[0]


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
    q_WTC, kv_WTC = (_split(t, grid, region) for t in (q_BNC, kv_BNC))
    B, R, K = routes_BRK.shape
    chosen = routes_BRK + R * torch.arange(B, device=routes_BRK.device).view(B, 1, 1)
    kv_WSC = kv_WTC.index_select(0, chosen.flatten()).view(B * R, K * kv_WTC.shape[1], kv_WTC.shape[2])
    k_WSC, v_WSC = kv_WSC.split([qk_dim, kv_WSC.shape[-1] - qk_dim], -1)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q_WTC, k_WSC, v_WSC))
    o_WTC = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    o_BNC = _merge(o_WTC, grid, region)
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


def _regions(grid: tuple[int, ...], region: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of regions."""
    return -(-grid[0] // region[0]), -(-grid[1] // region[1])


def _split(x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int]) -> Tensor:
    """(B, N, C) → (B·R, T, C), completed with zeros."""
    (rows, columns), (h, w) = _regions(grid, region), region
    x = x_BNC.unflatten(1, grid[:2])
    if (rows * h, columns * w) != tuple(grid[:2]):
        x = F.pad(x, (0, 0, 0, columns * w - grid[1], 0, rows * h - grid[0]))
    return x.unflatten(2, (columns, w)).unflatten(1, (rows, h)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _merge(x_WTC: Tensor, grid: tuple[int, ...], region: tuple[int, int]) -> Tensor:
    """The inverse of `_split`, without what it added."""
    rows, columns = _regions(grid, region)
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
    rows, columns = _regions(grid, region)
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
        conv._check(qkv[..., 2 * qk_dim :], grid[:2], 0, weight, bias, None)
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


# Registration


def _means(x, height, width, region_height, region_width):
    from kernels.routed_attention import triton as fused

    return fused.region_means(x, (height, width), (region_height, region_width))


def _selection(q, k, topk, scale):
    from kernels.routed_attention import triton as fused

    return fused.select_regions(q, k, topk, scale)


def _forward(qkv, lepe_weight, lepe_bias, routes, height, width, region_height, region_width, heads, qk_dim, scale):
    from kernels.routed_attention import triton as fused

    grid, region = (height, width), (region_height, region_width)
    out, lse = fused.forward(qkv, routes, grid, region, heads, qk_dim, scale)
    if lepe_weight is None:
        return out, out.new_empty(0), lse
    return fused.add_lepe(out, qkv[..., 2 * qk_dim :], lepe_weight, lepe_bias, grid), out, lse


def _backward(
    grad, qkv, out, lse, lepe_weight, routes, height, width, region_height, region_width, heads, qk_dim, scale
):
    from kernels.routed_attention import triton as fused

    grid, region = (height, width), (region_height, region_width)
    d_qkv = fused.backward(grad, qkv, out, lse, routes, grid, region, heads, qk_dim, scale)
    if lepe_weight is None:
        return d_qkv, lse.new_empty(0), lse.new_empty(0)
    v, dv = qkv[..., 2 * qk_dim :], d_qkv[..., 2 * qk_dim :]
    dweight, dbias = fused.lepe_gradients(grad, v, dv, lepe_weight, grid)
    return d_qkv, dweight.to(lepe_weight.dtype), dbias.to(lepe_weight.dtype)


def _fake_means(x, height, width, region_height, region_width):
    rows, columns = _regions((height, width), (region_height, region_width))
    return x.new_empty(x.shape[0], rows * columns, x.shape[2], dtype=torch.float32)


def _fake_selection(q, k, topk, scale):
    return q.new_empty(q.shape[0], q.shape[1], topk, dtype=torch.int64)


def _fake_forward(
    qkv, lepe_weight, lepe_bias, routes, height, width, region_height, region_width, heads, qk_dim, scale
):
    B, N, channels = qkv.shape
    out = qkv.new_empty(B, N, channels - 2 * qk_dim)
    alone = qkv.new_empty(out.shape if lepe_weight is not None else 0)
    return out, alone, qkv.new_empty(B, heads, N, dtype=torch.float32)


def _fake_backward(grad, qkv, out, lse, lepe_weight, *_):
    weight = lse.new_empty(0) if lepe_weight is None else lepe_weight.new_empty(lepe_weight.shape)
    return qkv.new_empty(qkv.shape), weight, weight.new_empty(weight.shape[0])


def _flops_means(x, *_, out_shape=None, **__):
    return x[0] * x[1] * x[2]


def _flops_selection(q, *_, out_shape=None, **__):
    return 2 * q[0] * q[1] ** 2 * q[2]


def _flops(qkv, weight, bias, routes, height, width, region_height, region_width, heads, qk_dim, *_, **__):
    keys, tokens, C = routes[2] * region_height * region_width, qkv[0] * height * width, qkv[2] - 2 * qk_dim
    return 2 * tokens * keys * (qk_dim + C) + (2 * tokens * C * weight[-1] ** 2 if weight else 0)


def _flops_backward(
    grad, qkv, out, lse, weight, routes, height, width, region_height, region_width, heads, qk_dim, *_, **__
):
    keys, tokens, C = routes[2] * region_height * region_width, qkv[0] * height * width, qkv[2] - 2 * qk_dim
    return 2 * tokens * keys * (3 * qk_dim + 2 * C) + (4 * tokens * C * weight[-1] ** 2 if weight else 0)


_MAP = "SymInt height, SymInt width, SymInt region_height, SymInt region_width"
_SIZES = f"Tensor routes, {_MAP}, int heads, SymInt qk_dim, float? scale"
means_op = define(f"region_means(Tensor x, {_MAP}) -> Tensor", _means, _fake_means, _flops_means)
selection_op = define(
    "select_regions(Tensor q, Tensor k, int topk, float scale) -> Tensor", _selection, _fake_selection, _flops_selection
)
forward_op = define(
    "routed_attention_forward(Tensor qkv, Tensor? lepe_weight, Tensor? lepe_bias, "
    f"{_SIZES}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "routed_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor? lepe_weight, "
    f"{_SIZES}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


class _RoutedAttention(torch.autograd.Function):
    """Its second and third result are the attention without LePE (empty where that is the first) and the statistics."""

    @staticmethod
    def forward(ctx, qkv, lepe_weight, lepe_bias, routes, *sizes):
        total, alone, lse = forward_op(qkv, lepe_weight, lepe_bias, routes, *sizes)
        ctx.save_for_backward(qkv, total if lepe_weight is None else alone, lse, lepe_weight, routes)
        ctx.sizes, ctx.bias = sizes, lepe_bias is not None
        ctx.mark_non_differentiable(alone, lse)
        return total, alone, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        qkv, out, lse, lepe_weight, routes = ctx.saved_tensors
        d_qkv, dweight, dbias = backward_op(grad, qkv, out, lse, lepe_weight, routes, *ctx.sizes)
        return (
            d_qkv,
            None if lepe_weight is None else dweight,
            dbias if ctx.bias else None,
            *[None] * (1 + len(ctx.sizes)),
        )


# Shapes for the tests and the benchmark


def inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    heads: int,
    region: tuple[int, int],
    topk: int,
    qk_dim: int | None = None,
    lepe: int = 0,
) -> dict:
    """Keyword arguments of `routed_attention`; `lepe` is the side of the convolution.

    Routes are as smooth over the map as those of images: 2x2 neighbours share a random feature and differ by noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    (rows, columns), qk_dim = _regions(grid, region), qk_dim or dim

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    coarse = random(batch, -(-rows // 2), -(-columns // 2), 32).repeat_interleave(2, 1).repeat_interleave(2, 2)
    q, k = (coarse[:, :rows, :columns] + 0.25 * random(batch, rows, columns, 32) for _ in range(2))
    k = k @ random(32, 32)
    return {
        "qkv_BNC": random(batch, grid[0] * grid[1], 2 * qk_dim + dim, dtype=dtype).requires_grad_(),
        "routes_BRK": (q.flatten(1, 2) @ k.flatten(1, 2).mT).topk(topk, -1).indices,
        "grid": grid,
        "region": region,
        "num_heads": heads,
        "qk_dim": qk_dim,
        "lepe_weight": (random(dim, 1, lepe, lepe) / lepe).requires_grad_() if lepe else None,
        "lepe_bias": random(dim).requires_grad_() if lepe else None,
    }


def cost(
    itemsize: int,
    *,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    region: tuple[int, int],
    topk: int,
    qk_dim: int | None = None,
    lepe: int = 0,
    **_,
) -> Cost:
    """Forward reads q, k, v and writes o; backward reads these four and the gradient, and writes three gradients."""
    tokens, keys, qk_dim = batch * grid[0] * grid[1], topk * region[0] * region[1], qk_dim or dim
    tensors = tokens * (2 * qk_dim + dim) * itemsize
    o, conv_flops = tokens * dim * itemsize, 2 * tokens * dim * lepe**2
    return Cost(
        tensors + o,
        2 * tensors + 2 * o,
        2 * tokens * keys * (qk_dim + dim) + conv_flops,
        2 * tokens * keys * (3 * qk_dim + 2 * dim) + 2 * conv_flops,
    )


CHECKS = {
    "1 of 2 regions of 4x4, LePE": {
        "batch": 2, "grid": (4, 8), "dim": 16, "heads": 1, "region": (4, 4), "topk": 1, "lepe": 3,
    },
    "3 of 6 regions of 4x4": {"batch": 1, "grid": (8, 12), "dim": 32, "heads": 2, "region": (4, 4), "topk": 3},
    "1 of 4 regions of 8x8": {"batch": 1, "grid": (16, 16), "dim": 32, "heads": 1, "region": (8, 8), "topk": 1},
    "4 of 9 regions of 2x2, LePE": {
        "batch": 1, "grid": (6, 6), "dim": 72, "heads": 3, "region": (2, 2), "topk": 4, "lepe": 5,
    },
    "all of 6 regions of 2x3, padded, narrow queries": {
        "batch": 1, "grid": (4, 7), "dim": 96, "heads": 2, "region": (2, 3), "topk": 6, "qk_dim": 32,
    },
    "4 of 35 regions of 1x1": {"batch": 1, "grid": (5, 7), "dim": 32, "heads": 1, "region": (1, 1), "topk": 4},
    "3 of 72 regions of 1x1": {"batch": 1, "grid": (8, 9), "dim": 16, "heads": 1, "region": (1, 1), "topk": 3},
    "2 of 4 regions of 8x8, padded, one head, LePE": {
        "batch": 1, "grid": (9, 13), "dim": 24, "heads": 1, "region": (8, 8), "topk": 2, "lepe": 3,
    },
    "2 of 4 regions of 7x3, padded, wide queries": {
        "batch": 1, "grid": (13, 5), "dim": 32, "heads": 2, "region": (7, 3), "topk": 2, "qk_dim": 64,
    },
}  # fmt: skip


def _stage(batch: int, side: int, dim: int, region: int, topk: int) -> dict:
    return {
        "batch": batch, "grid": (side, side), "dim": dim, "heads": dim // 32, "region": (region, region), "topk": topk,
        "lepe": 5,
    }  # fmt: skip


STAGES = {
    "224 px stage 1 (B)": _stage(128, 56, 96, 8, 1),
    "224 px stage 2 (B)": _stage(128, 28, 192, 4, 4),
    "224 px stage 3 (B)": _stage(128, 14, 384, 2, 16),
    "224 px stage 1 (T, S)": _stage(128, 56, 64, 8, 1),
    "224 px stage 2 (T, S)": _stage(128, 28, 128, 4, 4),
    "224 px stage 3 (T, S)": _stage(128, 14, 256, 2, 16),
    "512 px stage 1, 8x8 regions (B)": _stage(16, 128, 96, 16, 1),
    "512 px stage 2, 8x8 regions (B)": _stage(16, 64, 192, 8, 4),
    "512 px stage 3, 8x8 regions (B)": _stage(16, 32, 384, 4, 16),
    "1024 px stage 1, 16x16 regions (B)": _stage(4, 256, 96, 16, 1),
    "1024 px stage 2, 16x16 regions (B)": _stage(4, 128, 192, 8, 4),
    "1024 px stage 3, 16x16 regions (B)": _stage(4, 64, 384, 4, 16),
    "224 px stage 1, one image (B)": _stage(1, 56, 96, 8, 1),
    "224 px stage 3, one image (B)": _stage(1, 14, 384, 2, 16),
}


def _gathered(qkv_BNC, routes_BRK, grid, region, num_heads, *, qk_dim, scale=None, lepe_weight=None, lepe_bias=None):
    """As the authors' code does it: windows are copied out, and keys gathered out of a tensor expanded R times."""
    B, R, K = routes_BRK.shape
    q_WTC, kv_WTC = (_split(t, grid, region) for t in qkv_BNC.split([qk_dim, qkv_BNC.shape[-1] - qk_dim], -1))
    T, width = kv_WTC.shape[1:]
    source = kv_WTC.view(B, 1, R, T, width).expand(-1, R, -1, -1, -1)
    kv = torch.gather(source, 2, routes_BRK.view(B, R, K, 1, 1).expand(-1, -1, -1, T, width))
    k, v = kv.split([qk_dim, width - qk_dim], -1)
    q = q_WTC.unflatten(-1, (num_heads, -1)).transpose(1, 2).contiguous()
    k = k.unflatten(-1, (num_heads, -1)).permute(0, 1, 4, 5, 2, 3).reshape(B * R, num_heads, qk_dim // num_heads, K * T)
    v = v.unflatten(-1, (num_heads, -1)).permute(0, 1, 4, 2, 3, 5).reshape(B * R, num_heads, K * T, -1)
    weights = ((q * (qk_dim**-0.5 if scale is None else scale)) @ k).softmax(-1)
    o_BNC = _merge((weights @ v).transpose(1, 2).flatten(2), grid, region)
    if lepe_weight is None:
        return o_BNC
    v_BCHW = qkv_BNC[..., 2 * qk_dim :].unflatten(1, grid[:2]).permute(0, 3, 1, 2).contiguous()
    parameters = (p.to(v_BCHW.dtype) for p in (lepe_weight, lepe_bias))
    lepe = F.conv2d(v_BCHW, *parameters, padding=lepe_weight.shape[-1] // 2, groups=len(lepe_weight))
    return o_BNC + lepe.flatten(2).transpose(1, 2).contiguous()


def _dense(qkv_BNC, routes_BRK, grid, region, num_heads, *, qk_dim, scale=None, **_):
    """Attention of every token to every token, without routes and LePE."""
    parts = qkv_BNC.split([qk_dim, qk_dim, qkv_BNC.shape[-1] - 2 * qk_dim], -1)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in parts)
    return F.scaled_dot_product_attention(q, k, v, scale=scale or qk_dim**-0.5).transpose(1, 2).flatten(2)


ATTENTION = Operation(
    name=WHO,
    run=routed_attention,
    reference=reference,
    inputs=inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=cost,
    baselines={"official": _gathered, "pytorch": reference, "sdpa": _dense},
)


# Routing as the models have it, but for the projection of the means


def routing(
    x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int], topk: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Means of the regions, and the regions whose means are most alike."""
    means_BRC = region_means(x_BNC, grid, region, backend=backend)
    return means_BRC, select_regions(means_BRC, means_BRC, topk, x_BNC.shape[2] ** -0.5, backend=backend)


def reference_routing(
    x_BNC: Tensor, grid: tuple[int, ...], region: tuple[int, int], topk: int
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    means_BRC = reference_means(x_BNC, grid, region)
    return means_BRC, reference_selection(means_BRC, means_BRC, topk, x_BNC.shape[2] ** -0.5)


def routing_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    region: tuple[int, int],
    topk: int,
    **_,
) -> dict:
    """Keyword arguments of `routing`."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, grid[0] * grid[1], dim, generator=generator, device=device, dtype=dtype)
    return {"x_BNC": x, "grid": grid, "region": region, "topk": topk}


def routing_cost(
    itemsize: int, *, batch: int, grid: tuple[int, int], dim: int, region: tuple[int, int], topk: int, **_
) -> Cost:
    """Reads x, and writes the means in float32."""
    rows, columns = _regions(grid, region)
    x, means = batch * grid[0] * grid[1] * dim, batch * rows * columns * dim
    return Cost(x * itemsize + 4 * means, 0, x + 2 * means * rows * columns, 0)


ROUTING = Operation(
    name="region_routing",
    run=routing,
    reference=reference_routing,
    inputs=routing_inputs,
    checks={
        "3 of 6 regions of 4x4, padded": {"batch": 2, "grid": (7, 10), "dim": 32, "region": (4, 4), "topk": 3},
        "1 of 49 regions of 1x1": {"batch": 1, "grid": (7, 7), "dim": 24, "region": (1, 1), "topk": 1},
        "all of 2 regions of 13x9": {"batch": 1, "grid": (13, 12), "dim": 200, "region": (13, 9), "topk": 2},
    },
    stages=STAGES,
    cost=routing_cost,
    baselines={"official": reference_routing},
)
OPERATIONS = (ATTENTION, ROUTING)
