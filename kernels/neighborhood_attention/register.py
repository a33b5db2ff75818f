"""The operators of neighbourhood attention: launches, fake results, FLOPs and gradients."""

import torch

from kernels.registration import define, differentiable


def _forward(qkv, rpb, height, width, heads, kh, kw, sy, sx, dy, dx, scale):
    from kernels.neighborhood_attention import triton as fused

    out, lse = _fake_forward(qkv, rpb, height, width, heads)
    fused.forward(qkv, rpb, (height, width), heads, ((kh, kw), (sy, sx), (dy, dx)), scale, out, lse)
    return out, lse


def _backward(grad, qkv, rpb, out, lse, height, width, heads, kh, kw, sy, sx, dy, dx, scale, needed):
    from kernels.neighborhood_attention import triton_backward as fused

    sides = ((kh, kw), (sy, sx), (dy, dx))
    return fused.backward(grad, qkv, rpb, out, lse, (height, width), heads, sides, scale, needed)


def _fake_forward(qkv, rpb, height, width, heads, *_):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return qkv.new_empty((B, N, C)), qkv.new_empty((B, heads, N), dtype=torch.float32)


def _fake_backward(grad, qkv, rpb, *others):
    rpb = rpb if others[-1][1] else None
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)


def _flops(qkv, rpb, height, width, heads, kh, kw, *_, out_shape=None, **__):
    return 4 * qkv[0] * qkv[1] * kh * kw * (qkv[2] // 3)


def _flops_backward(grad, qkv, rpb, out, lse, height, width, heads, kh, kw, *_, out_shape=None, **__):
    return 10 * qkv[0] * qkv[1] * kh * kw * (qkv[2] // 3)


_SIZES = "SymInt height, SymInt width, int heads, int kh, int kw, int sy, int sx, int dy, int dx, float scale"
forward_op = define(
    f"neighborhood_attention_forward(Tensor qkv, Tensor? rpb, {_SIZES}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "neighborhood_attention_backward(Tensor grad, Tensor qkv, Tensor? rpb, Tensor out, Tensor lse, "
    f"{_SIZES}, bool[] needed) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


def _kept(arguments: tuple, results: tuple) -> tuple:
    return *arguments[:2], *results, *arguments[2:]


attend = differentiable(forward_op, backward_op, _kept, selective=True)
