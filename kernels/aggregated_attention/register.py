"""The operators of aggregated attention: launches, fake results, FLOPs and gradients."""

import torch

from kernels.registration import define, differentiable

PARAMETERS = ("scale", "query_embedding", "local_bias", "pool_bias", "tokens", "token_bias", "gates")


def _forward(qkv, kv_pool, scale, embedding, local_bias, pool_bias, tokens, token_bias, gates, height, width, window):
    from kernels.aggregated_attention import triton as fused

    parameters = (scale, embedding, local_bias, pool_bias, tokens, token_bias, gates)
    return fused.forward(qkv, kv_pool, parameters, (height, width), window)


def _backward(
    grad, qkv, kv_pool, scale, embedding, local_bias, pool_bias, tokens, token_bias, gates, lse, height, width, window,
    needed,
):  # fmt: skip
    from kernels.aggregated_attention import triton_backward as fused

    parameters = (scale, embedding, local_bias, pool_bias, tokens, token_bias, gates)
    return fused.backward(grad, qkv, kv_pool, parameters, lse, (height, width), window, needed)


def _fake_forward(qkv, kv_pool, scale, *_):
    B, N, C = qkv.shape
    return qkv.new_empty(B, N, C // 3), qkv.new_empty(B, scale.shape[0], N, dtype=torch.float32)


def _fake_backward(grad, qkv, kv_pool, *others):
    *parameters, gates = others[: len(PARAMETERS)]
    gates = qkv.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    needed = others[-1]
    left_out = {1: not any(needed[1:3]), 5: not needed[5]}
    tensors = (qkv, kv_pool, *parameters)
    return (*(t.new_empty(0 if left_out.get(i) else t.shape) for i, t in enumerate(tensors)), gates)


def _flops(qkv, kv_pool, *others, out_shape=None, **__):
    window = others[-1]
    return 2 * qkv[0] * qkv[1] * qkv[2] // 3 * (2 * kv_pool[1] + 3 * window**2)


def _flops_backward(grad, qkv, kv_pool, *others, out_shape=None, **__):
    window = others[-2]
    return 2 * qkv[0] * qkv[1] * qkv[2] // 3 * (5 * kv_pool[1] + 8 * window**2)


_TENSORS = (
    "Tensor qkv, Tensor kv_pool, Tensor scale, Tensor embedding, Tensor local_bias, Tensor pool_bias, Tensor tokens, "
    "Tensor token_bias, Tensor? gates"
)
_SIZES = "SymInt height, SymInt width, int window"
forward_op = define(
    f"aggregated_attention_forward({_TENSORS}, {_SIZES}) -> (Tensor, Tensor)", _forward, _fake_forward, _flops
)
backward_op = define(
    f"aggregated_attention_backward(Tensor grad, {_TENSORS}, Tensor lse, {_SIZES}, bool[] needed) "
    f"-> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _fake_backward,
    _flops_backward,
)
attend = differentiable(
    forward_op, backward_op, lambda arguments, results: (*arguments[:-3], results[1], *arguments[-3:]), selective=True
)
