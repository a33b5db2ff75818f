"""The operators of attention with routed heads: launches, fake results, FLOPs and gradients."""

import torch

from kernels.registration import define, differentiable


def routed_heads(logits: int, shared: int, routed: int) -> int:
    """E, from the number of logits."""
    return logits - (shared if shared > 1 else 0) - (2 if shared else 0) if routed else 0


def _forward(qkv, gates, scale, skip):
    from kernels.moh_attention import triton as fused

    return fused.forward(qkv, gates, scale, skip)


def _backward(grad, qkv, gates, out, lse, index, count, scale, needed):
    from kernels.moh_attention import triton as fused

    return fused.backward(grad, qkv, gates, out, lse, index, count, scale, needed)


def _route(logits, shared, routed):
    from kernels.moh_attention import triton_router as fused

    return fused.route(logits, shared, routed)


def _route_backward(grad, balance, logits, load, shared, routed):
    from kernels.moh_attention import triton_router as fused

    if grad is None:
        grad = balance.new_zeros(*logits.shape[:2], shared + load.shape[0])
    return fused.route_backward(grad, balance, logits, load, shared, routed)


def _fake_forward(qkv, gates, scale, skip):
    (B, N, C), M = qkv.shape, gates.shape[2]
    return (
        qkv.new_empty(B, N, C // 3),
        qkv.new_empty(B, M, N, dtype=torch.float32),
        qkv.new_empty(B, M, N if skip else 0, dtype=torch.int32),
        qkv.new_empty(B, M if skip else 0, dtype=torch.int32),
    )


def _fake_backward(grad, qkv, gates, out, lse, index, count, scale, needed):
    return qkv.new_empty(qkv.shape), gates.new_empty(gates.shape)


def _fake_route(logits, shared, routed):
    B, N, L = logits.shape
    E = routed_heads(L, shared, routed)
    return logits.new_empty(B, N, shared + E), logits.new_empty(()), logits.new_empty(E)


def _fake_route_backward(grad, balance, logits, load, shared, routed):
    return logits.new_empty(logits.shape)


def _flops(qkv, *_, out_shape=None, **__):
    """Of all heads: how many gates are 0 is not known on the host."""
    return 4 * qkv[0] * qkv[1] ** 2 * (qkv[2] // 3)


def _flops_backward(grad, *_, out_shape=None, **__):
    return 10 * grad[0] * grad[1] ** 2 * grad[2]


def _flops_route(logits, *_, out_shape=None, **__):
    return 10 * logits[0] * logits[1] * logits[2]


def _flops_route_backward(grad, balance, logits, *_, out_shape=None, **__):
    return 20 * logits[0] * logits[1] * logits[2]


forward_op = define(
    "moh_attention_forward(Tensor qkv, Tensor gates, float scale, bool skip) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "moh_attention_backward(Tensor grad, Tensor qkv, Tensor gates, Tensor out, Tensor lse, Tensor index, Tensor count, "
    "float scale, bool[] needed) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)
route_op = define(
    "route_heads_forward(Tensor logits, int shared, int routed) -> (Tensor, Tensor, Tensor)",
    _route,
    _fake_route,
    _flops_route,
)
route_backward_op = define(
    "route_heads_backward(Tensor? grad, Tensor? balance, Tensor logits, Tensor load, int shared, int routed) -> Tensor",
    _route_backward,
    _fake_route_backward,
    _flops_route_backward,
)
attend = differentiable(
    forward_op,
    backward_op,
    lambda arguments, results: (*arguments[:2], *results, arguments[2]),
    selective=True,
)
route = differentiable(
    route_op, route_backward_op, lambda arguments, results: (arguments[0], results[2], *arguments[1:]), outputs=2
)
