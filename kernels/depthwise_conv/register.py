"""The operators of depth-wise convolution: launches, fake results, FLOPs and gradients."""

import torch
from torch import Tensor

from kernels.registration import define


def _forward(x, weight, bias, residual, height, width, prefix, gelu):
    from kernels.depthwise_conv import triton as fused

    out = torch.empty(x.shape, dtype=_dtype(x, residual), device=x.device)
    return fused.forward(x, weight, bias, out, (height, width, prefix), residual=residual, gelu=gelu)


def _backward(grad, x, weight, bias, height, width, prefix, gelu):
    from kernels.depthwise_conv import triton_backward as fused

    return fused.backward(grad, x, weight, bias, (height, width, prefix), gelu=gelu)


def _dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _fake_forward(x, weight, bias, residual, height, width, prefix, gelu):
    return x.new_empty(x.shape, dtype=_dtype(x, residual))


def _fake_backward(grad, x, weight, bias, height, width, prefix, gelu):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _flops(x, weight, bias, residual, height, width, *_, out_shape=None, **__):
    return 2 * x[0] * height * width * x[2] * weight[-1] ** 2


def _flops_backward(grad, x, weight, bias, height, width, *_, out_shape=None, **__):
    return 4 * x[0] * height * width * x[2] * weight[-1] ** 2


_SIZES = "SymInt height, SymInt width, int prefix, bool gelu"
forward_op = define(
    f"depthwise_conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {_SIZES}) -> Tensor",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    f"depthwise_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, {_SIZES})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


class DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, *sizes):
        ctx.save_for_backward(x, weight, bias)
        ctx.sizes, ctx.residual_dtype = sizes, None if residual is None else residual.dtype
        return forward_op(x, weight, bias, residual, *sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = backward_op(grad, x, weight, bias, *ctx.sizes)
        residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None
        return dx, dweight, dbias if bias is not None else None, residual, *[None] * len(ctx.sizes)
