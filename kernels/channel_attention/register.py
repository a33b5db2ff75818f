"""The operators of channel attention: launches, fake results, FLOPs and gradients."""

import torch
from torch import Tensor

from kernels.registration import define, differentiable

# With up to this many tokens backward computes the weights again, which costs less memory than to keep them.
KEPT_ABOVE = 64


def _kept(qkv: Tensor, num_heads: int) -> tuple:
    """Shape of the weights that are kept for backward: a row of D for each channel."""
    channels = qkv.shape[2] // 3
    return qkv.shape[0], channels, channels // num_heads if qkv.shape[1] > KEPT_ABOVE else 0


def _forward(qkv, num_heads, scale):
    from kernels.channel_attention import triton as fused

    o = torch.empty(*qkv.shape[:2], qkv.shape[2] // 3, dtype=qkv.dtype, device=qkv.device)
    state = torch.empty(_kept(qkv, num_heads), dtype=torch.float32, device=qkv.device)
    fused.forward(qkv, o, state, num_heads, scale)
    return o, state


def _backward(grad, qkv, state, num_heads, scale):
    from kernels.channel_attention import triton as fused

    return fused.backward(grad, qkv, state, num_heads, scale)


def _fake_forward(qkv, num_heads, scale):
    o = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    return o, qkv.new_empty(_kept(qkv, num_heads), dtype=torch.float32)


def _fake_backward(grad, qkv, state, num_heads, scale):
    return qkv.new_empty(qkv.shape)


def _flops(qkv, num_heads, *_, out_shape=None, **__):
    return 4 * qkv[0] * qkv[1] * (qkv[2] // 3) ** 2 // num_heads


def _flops_backward(grad, qkv, state, num_heads, *_, out_shape=None, **__):
    return 8 * qkv[0] * qkv[1] * (qkv[2] // 3) ** 2 // num_heads


forward_op = define(
    "channel_attention_forward(Tensor qkv, int num_heads, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "channel_attention_backward(Tensor grad, Tensor qkv, Tensor state, int num_heads, float scale) -> Tensor",
    _backward,
    _fake_backward,
    _flops_backward,
)
attend = differentiable(forward_op, backward_op, lambda arguments, results: (arguments[0], results[1], *arguments[1:]))
