"""The operators of cross-covariance attention: launches, fake results, FLOPs and gradients."""

import torch

from kernels.registration import define, differentiable

EPSILON = 1e-6  # a channel is never taken to be shorter


def _kept(qkv, num_heads):
    """For backward: cosines, a row of D for each channel of q, and the lengths of the channels of q and of k."""
    channels = qkv.shape[2] // 3
    shapes = (qkv.shape[0], channels, channels // num_heads), (qkv.shape[0], 2, channels)
    return tuple(torch.empty(shape, dtype=torch.float32, device=qkv.device) for shape in shapes)


def _forward(qkv, temperature, num_heads):
    from kernels.cross_covariance import triton as fused

    o = torch.empty(*qkv.shape[:2], qkv.shape[2] // 3, dtype=qkv.dtype, device=qkv.device)
    cosines, lengths = _kept(qkv, num_heads)
    fused.forward(qkv, temperature, o, cosines, lengths, num_heads)
    return o, cosines, lengths


def _backward(grad, qkv, temperature, cosines, lengths, num_heads):
    from kernels.cross_covariance import triton as fused

    return fused.backward(grad, qkv, temperature, cosines, lengths, num_heads)


def _fake_forward(qkv, temperature, num_heads):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3), *_kept(qkv, num_heads)


def _fake_backward(grad, qkv, temperature, cosines, lengths, num_heads):
    return qkv.new_empty(qkv.shape), temperature.new_empty(temperature.shape)


def _flops(qkv, temperature, num_heads, *_, out_shape=None, **__):
    return 4 * qkv[0] * qkv[1] * (qkv[2] // 3) ** 2 // num_heads


def _flops_backward(grad, qkv, temperature, cosines, lengths, num_heads, *_, out_shape=None, **__):
    return 8 * qkv[0] * qkv[1] * (qkv[2] // 3) ** 2 // num_heads


forward_op = define(
    "cross_covariance_forward(Tensor qkv, Tensor temperature, int num_heads) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "cross_covariance_backward(Tensor grad, Tensor qkv, Tensor temperature, Tensor cosines, Tensor lengths, "
    "int num_heads) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)
attend = differentiable(
    forward_op, backward_op, lambda arguments, results: (*arguments[:2], *results[1:], arguments[2])
)
