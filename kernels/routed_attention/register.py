"""The operators of routed attention: launches, fake results, FLOPs and gradients."""

import torch

from kernels.registration import define, differentiable


def regions_of(grid: tuple[int, ...], region: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of regions."""
    return -(-grid[0] // region[0]), -(-grid[1] // region[1])


def _means(x, height, width, region_height, region_width):
    from kernels.routed_attention import triton_routing as fused

    return fused.region_means(x, (height, width), (region_height, region_width))


def _selection(q, k, topk, scale):
    from kernels.routed_attention import triton_routing as fused

    return fused.select_regions(q, k, topk, scale)


def _forward(qkv, lepe_weight, lepe_bias, routes, height, width, region_height, region_width, heads, qk_dim, scale):
    from kernels.routed_attention import triton as fused

    grid, region = (height, width), (region_height, region_width)
    out, lse = fused.forward(qkv, routes, grid, region, heads, qk_dim, scale)
    if lepe_weight is None:
        return out, out.new_empty(0), lse
    return fused.add_lepe(out, qkv[..., 2 * qk_dim :], lepe_weight, lepe_bias, grid), out, lse


def _backward(
    grad, qkv, out, lse, lepe_weight, routes, height, width, region_height, region_width, heads, qk_dim, scale, needed
):
    from kernels.routed_attention import triton_backward as fused

    grid, region = (height, width), (region_height, region_width)
    d_qkv, *d_lepe = qkv.new_empty(0), lse.new_empty(0), lse.new_empty(0)
    if needed[0]:
        d_qkv = fused.backward(grad, qkv, out, lse, routes, grid, region, heads, qk_dim, scale)
    if lepe_weight is not None:
        v, dv = qkv[..., 2 * qk_dim :], d_qkv[..., 2 * qk_dim :] if needed[0] else None
        sums = fused.lepe_gradients(grad, v, dv, lepe_weight, grid, trained=any(needed[1:]))
        d_lepe = [g.to(lepe_weight.dtype) for g in sums] if sums else d_lepe
    return d_qkv, *d_lepe


def _fake_means(x, height, width, region_height, region_width):
    rows, columns = regions_of((height, width), (region_height, region_width))
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


def _fake_backward(grad, qkv, out, lse, lepe_weight, *others):
    needed = others[-1]
    trains = lepe_weight is not None and any(needed[1:])
    weight = lepe_weight.new_empty(lepe_weight.shape) if trains else lse.new_empty(0)
    return qkv.new_empty(qkv.shape if needed[0] else 0), weight, weight.new_empty(weight.shape[0])


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
    f"{_SIZES}, bool[] needed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


def _kept(arguments: tuple, results: tuple) -> tuple:
    """The output without LePE, which is the whole output where there is none."""
    qkv, lepe_weight, _, *sizes = arguments
    total, alone, lse = results
    return qkv, total if lepe_weight is None else alone, lse, lepe_weight, *sizes


attend = differentiable(forward_op, backward_op, _kept, selective=True)
