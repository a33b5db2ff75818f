"""The operators of linear attention: launches, fake results, FLOPs and gradients.

One pair of them; `constant` is the power of "focused" and the scale of "inline".
"""

import torch

from kernels.registration import define, differentiable


def _forward(qkv, scale, position, weight, bias, lepe_weight, lepe_bias, height, width, prefix, *options):
    from kernels.linear_attention import triton as fused

    parameters = (scale, position, weight, bias, lepe_weight, lepe_bias)
    return fused.forward(qkv, *parameters, (height, width, prefix), *options)


def _backward(grad, qkv, state, stats, taps, scale, position, weight, bias, lepe_weight, lepe_bias, height, width,
              prefix, heads, feature, constant, needed):  # fmt: skip
    from kernels.linear_attention import triton_backward as fused

    parameters = (scale, position, weight, bias, lepe_weight, lepe_bias)
    options = (height, width, prefix), heads, feature, constant, needed
    return fused.backward(grad, qkv, state, stats, taps, *parameters, *options)


def _fake_forward(
    qkv, scale, position, weight, bias, lepe_weight, lepe_bias, height, width, prefix, heads, feature, *_
):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = C // heads
    side = max((w.shape[-1] for w in (weight, lepe_weight) if w is not None), default=0)
    shapes = (
        (B, heads, D + (4 if feature == "inline" else 1), D),
        (4, B, N) if feature == "focused" else (0,),
        (side * side + 1, C) if side and feature == "focused" else (0,),
    )
    return qkv.new_empty(B, N, C), *(qkv.new_empty(s, dtype=torch.float32) for s in shapes)


def _fake_backward(grad, qkv, state, stats, taps, *others):
    trains = any(others[-1][3:])
    parameters = *others[:2], *(p if trains else None for p in others[2:6])
    return qkv.new_empty(qkv.shape), *(
        qkv.new_empty(0, dtype=torch.float32) if p is None else p.new_empty(p.shape) for p in parameters
    )


def _flops(qkv, scale, position, weight, bias, lepe_weight, lepe_bias, height, width, prefix, heads, *_, **__):
    side = max((w[-1] for w in (weight, lepe_weight) if w is not None), default=0)
    return flops_of(qkv[0], qkv[1], qkv[2] // 3, heads, height * width, side)


def _flops_backward(grad, qkv, state, stats, taps, scale, position, *rest, **__):
    return 2 * _flops(qkv, scale, position, *rest)


def flops_of(B: int, N: int, C: int, heads: int, cells: int, side: int) -> int:
    """State and output are 2 N C D each, the convolution 2 H W C k²."""
    return B * C * (4 * N * (C // heads) + 2 * cells * side**2)


_PARAMETERS = "Tensor? scale, Tensor? position, Tensor? weight, Tensor? bias, Tensor? lepe_weight, Tensor? lepe_bias"
_OPTIONS = "SymInt height, SymInt width, int prefix, int heads, str feature, float constant"
forward_op = define(
    f"linear_attention_forward(Tensor qkv, {_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "linear_attention_backward(Tensor grad, Tensor qkv, Tensor state, Tensor stats, Tensor taps, "
    f"{_PARAMETERS}, {_OPTIONS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)
attend = differentiable(
    forward_op,
    backward_op,
    lambda arguments, results: (arguments[0], *results[1:], *arguments[1:]),
    selective=True,
)
