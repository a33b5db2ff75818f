"""The operators of agent attention: launches, fake results, FLOPs and gradients."""

import torch
from torch import Tensor

from kernels.registration import define, differentiable


def _forward(qkv, gather, scatter, weight, bias, height, width, prefix, heads, down, across, scale):
    from kernels.agent_attention import triton as fused

    return fused.forward(qkv, gather, scatter, weight, bias, (height, width, prefix), heads, (down, across), scale)


def _backward(
    grad, qkv, agents, gathered, lse, gather, scatter, weight, height, width, prefix, heads, down, across, scale, needed
):
    from kernels.agent_attention import triton_backward as fused

    saved = agents, gathered, lse
    grid = (height, width, prefix)
    return fused.backward(grad, qkv, saved, gather, scatter, weight, grid, heads, (down, across), scale, needed)


def _fake_forward(qkv, gather, scatter, weight, bias, height, width, prefix, heads, down, across, scale):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    state = qkv.new_empty((B, heads, down * across, C // heads))
    return (
        qkv.new_empty((B, N, C)),
        state,
        torch.empty_like(state),
        state.new_empty(state.shape[:3], dtype=torch.float32),
    )


def _fake_backward(grad, qkv, agents, gathered, lse, gather, scatter, weight, *others):
    weight = weight if any(others[-1][3:]) else None
    dweight, dbias = _empty(qkv, weight), qkv.new_empty(0) if weight is None else weight.new_empty(weight.shape[0])
    return qkv.new_empty(qkv.shape), _empty(qkv, gather), _empty(qkv, scatter), dweight, dbias


def _empty(qkv: Tensor, like: Tensor | None) -> Tensor:
    return qkv.new_empty(0) if like is None else like.new_empty(like.shape)


def _flops(qkv, gather, scatter, weight, bias, height, width, prefix, heads, down, across, *_, out_shape=None, **__):
    B, N, C3 = qkv
    local = 0 if weight is None else 2 * height * width * weight[-1] ** 2
    return B * C3 // 3 * (8 * N * down * across + local)


def _flops_backward(grad, qkv, agents, gathered, lse, gather, scatter, weight, *sizes, out_shape=None, **__):
    return 2 * _flops(qkv, gather, scatter, weight, None, *sizes)


_SIZES = "SymInt height, SymInt width, int prefix, int heads, int down, int across, float scale"
_TABLES = "Tensor? gather, Tensor? scatter, Tensor? weight"
forward_op = define(
    f"agent_attention_forward(Tensor qkv, {_TABLES}, Tensor? bias, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    f"agent_attention_backward(Tensor grad, Tensor qkv, Tensor agents, Tensor gathered, Tensor lse, {_TABLES}, "
    f"{_SIZES}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


def _kept(arguments: tuple, results: tuple) -> tuple:
    qkv, gather, scatter, weight, _, *sizes = arguments
    return qkv, *results[1:], gather, scatter, weight, *sizes


attend = differentiable(forward_op, backward_op, _kept, selective=True)
