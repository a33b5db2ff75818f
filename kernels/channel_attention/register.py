"""The operators of channel attention: launches, fake results, FLOPs and gradients."""

import torch
from torch import Tensor

from kernels.registration import define

# With up to this many tokens backward computes the weights again, which costs less memory than to keep them.
KEPT_ABOVE = 64


def full_precision(x: Tensor):
    """Autocast off inside."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


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


class ChannelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads, scale):
        o, state = forward_op(qkv, num_heads, scale)
        ctx.save_for_backward(qkv, state)
        ctx.options = num_heads, scale
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None


def _gram(x):
    from kernels.channel_attention import triton as fused

    return fused.gram(x)


def _fake_gram(x):
    B, _, C = x.shape
    return x.new_empty(B, C, C, dtype=torch.float32), x.new_empty(B, C, dtype=torch.float32)


def _flops_gram(x, *_, out_shape=None, **__):
    return 2 * x[0] * x[1] * x[2] ** 2


gram_op = define("channel_gram(Tensor x) -> (Tensor, Tensor)", _gram, _fake_gram, _flops_gram)


class Gram(torch.autograd.Function):
    """xᵀ x and the sum over tokens, in float32."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return gram_op(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dgram, dtotal):
        (x,) = ctx.saved_tensors
        with full_precision(x):
            return torch.baddbmm(dtotal.to(x.dtype).unsqueeze(1), x, (dgram + dgram.mT).to(x.dtype))
