"""The operators of dense attention with other weights: launches, fake results, FLOPs and gradients."""

import torch

from kernels.registration import define, differentiable


def _sigmoid(qkv, bias, heads, scale, shift):
    from kernels.dense_attention import triton as fused

    return fused.forward(qkv, bias, None, heads, (scale, shift, 0.0, 1.0))


def _sigmoid_backward(grad, qkv, bias, heads, scale, shift, needed):
    from kernels.dense_attention import triton_backward as fused

    return fused.backward(grad, qkv, bias, None, heads, (scale, shift, 0.0, 1.0), needed)


def _clipped(qkv, heads, scale, gamma, zeta):
    from kernels.dense_attention import triton as fused

    _, lse = _fake_clipped(qkv, heads, scale, gamma, zeta)
    return fused.forward(qkv, None, lse, heads, (scale, 0.0, gamma, zeta)), lse


def _clipped_backward(grad, qkv, lse, heads, scale, gamma, zeta):
    from kernels.dense_attention import triton_backward as fused

    return fused.backward(grad, qkv, None, lse, heads, (scale, 0.0, gamma, zeta), [True])[0]


def _fake_sigmoid(qkv, *_):
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))


def _fake_sigmoid_backward(grad, qkv, bias, heads, scale, shift, needed):
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if bias is None or not needed[1] else bias.new_empty(bias.shape)


def _fake_clipped(qkv, heads, *_):
    return _fake_sigmoid(qkv), qkv.new_empty((qkv.shape[0], heads, qkv.shape[1]), dtype=torch.float32)


def _fake_clipped_backward(grad, qkv, *_):
    return qkv.new_empty(qkv.shape)


def _flops(qkv, *_, out_shape=None, **__):
    """The products of the definition; the kernels compute those of queries and keys more than once."""
    return 4 * qkv[0] * qkv[1] ** 2 * (qkv[2] // 3)


def _flops_backward(grad, *_, out_shape=None, **__):
    return 10 * grad[0] * grad[1] ** 2 * grad[2]


sigmoid_op = define(
    "sigmoid_attention_forward(Tensor qkv, Tensor? bias, int heads, float scale, float shift) -> Tensor",
    _sigmoid,
    _fake_sigmoid,
    _flops,
)
sigmoid_backward_op = define(
    "sigmoid_attention_backward(Tensor grad, Tensor qkv, Tensor? bias, int heads, float scale, float shift, "
    "bool[] needed) -> (Tensor, Tensor)",
    _sigmoid_backward,
    _fake_sigmoid_backward,
    _flops_backward,
)
clipped_op = define(
    "clipped_attention_forward(Tensor qkv, int heads, float scale, float gamma, float zeta) -> (Tensor, Tensor)",
    _clipped,
    _fake_clipped,
    _flops,
)
clipped_backward_op = define(
    "clipped_attention_backward(Tensor grad, Tensor qkv, Tensor lse, int heads, float scale, float gamma, float zeta) "
    "-> Tensor",
    _clipped_backward,
    _fake_clipped_backward,
    _flops_backward,
)
attend_sigmoid = differentiable(sigmoid_op, sigmoid_backward_op, lambda arguments, results: arguments, selective=True)
attend_clipped = differentiable(
    clipped_op, clipped_backward_op, lambda arguments, results: (arguments[0], results[1], *arguments[1:])
)
