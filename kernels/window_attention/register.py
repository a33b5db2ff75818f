"""The operators of window attention: launches, fake results, FLOPs and gradients."""

import torch

from kernels.registration import define, differentiable

ONE_TILE = 64


def _forward(qkv, padding, bias, height, width, heads, h, w, sy, sx, scale):
    from kernels.window_attention import triton as fused

    out, lse = _fake_forward(qkv, padding, bias, height, width, heads, h, w, sy, sx, scale)
    fused.forward(qkv, padding, bias, (height, width), heads, (h, w), (sy, sx), scale, out, lse)
    return out, lse


def _backward(grad, qkv, padding, bias, out, lse, height, width, heads, h, w, sy, sx, scale, needed):
    from kernels.window_attention import triton_backward as fused

    sizes = (height, width), heads, (h, w), (sy, sx), scale
    return fused.backward(grad, qkv, padding, bias, out, lse, *sizes, needed)


def _fake_forward(qkv, padding, bias, height, width, heads, h, w, sy, sx, scale):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    statistics = (0,) if h * w <= ONE_TILE else (B, heads, N)
    return qkv.new_empty((B, N, C)), qkv.new_empty(statistics, dtype=torch.float32)


def _fake_backward(grad, qkv, padding, bias, *others):
    bias = bias if others[-1][2] else None
    padding, bias = (qkv.new_empty(0) if p is None else p.new_empty(p.shape) for p in (padding, bias))
    return qkv.new_empty(qkv.shape), padding, bias


def _flops(qkv, padding, bias, height, width, heads, h, w, *_, out_shape=None, **__):
    return 4 * qkv[0] * windows_of(height, width, h, w) * (h * w) ** 2 * (qkv[2] // 3)


def _flops_backward(grad, qkv, padding, bias, out, lse, height, width, heads, h, w, *_, out_shape=None, **__):
    return 10 * qkv[0] * windows_of(height, width, h, w) * (h * w) ** 2 * (qkv[2] // 3)


def windows_of(height, width, h, w):
    return -(-height // h) * -(-width // w)


_SIZES = "SymInt height, SymInt width, int heads, int h, int w, int sy, int sx, float scale"
forward_op = define(
    f"window_attention_forward(Tensor qkv, Tensor? padding, Tensor? bias, {_SIZES}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "window_attention_backward(Tensor grad, Tensor qkv, Tensor? padding, Tensor? bias, Tensor? out, Tensor? lse, "
    f"{_SIZES}, bool[] needed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


def _kept(arguments: tuple, results: tuple) -> tuple:
    """Windows of one tile are computed again, and need neither output nor statistics."""
    _, _, _, _, _, _, h, w, *_ = arguments
    return *arguments[:3], *((None, None) if h * w <= ONE_TILE else results), *arguments[3:]


attend = differentiable(forward_op, backward_op, _kept, selective=True)
