"""The operators of layer norm: launches, fake results, FLOPs and gradients."""

import torch

from kernels.registration import define


def _conv_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, height, width, prefix, eps, dtype):
    from kernels.layer_norm import triton as fused

    grid = (height, width, prefix)
    return fused.conv_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, grid, eps, dtype)


def _conv_backward(dy, dn, x, y, conv_weight, norm_weight, height, width, prefix, eps):
    from kernels.layer_norm import triton as fused

    return fused.conv_backward(dy, dn, x, y, conv_weight, norm_weight, (height, width, prefix), eps)


def _fake_conv_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, height, width, prefix, eps, dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


def _fake_conv_backward(dy, dn, x, y, conv_weight, norm_weight, height, width, prefix, eps):
    vectors = (p.new_empty(p.shape[0]) for p in (conv_weight, norm_weight, norm_weight))
    return x.new_empty(x.shape), conv_weight.new_empty(conv_weight.shape), *vectors


def _flops(x, conv_weight, conv_bias, norm_weight, norm_bias, height, width, *_, out_shape=None, **__):
    return 2 * x[0] * height * width * x[2] * conv_weight[-1] ** 2


def _flops_backward(dy, dn, x, y, conv_weight, norm_weight, height, width, *_, out_shape=None, **__):
    return 4 * x[0] * height * width * x[2] * conv_weight[-1] ** 2


_SIZES = "SymInt height, SymInt width, int prefix"
conv_forward_op = define(
    "conv_norm_forward(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor norm_weight, Tensor norm_bias, "
    f"{_SIZES}, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _conv_forward,
    _fake_conv_forward,
    _flops,
)
conv_backward_op = define(
    "conv_norm_backward(Tensor dy, Tensor dn, Tensor x, Tensor y, Tensor conv_weight, Tensor norm_weight, "
    f"{_SIZES}, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv_backward,
    _fake_conv_backward,
    _flops_backward,
)


class ConvNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, conv_weight, conv_bias, norm_weight, norm_bias, height, width, prefix, eps, dtype):
        parameters = (conv_weight, conv_bias, norm_weight, norm_bias)
        y, n = conv_forward_op(x, *parameters, height, width, prefix, eps, dtype)
        ctx.save_for_backward(x, y, conv_weight, norm_weight)
        ctx.options = height, width, prefix, eps
        return y, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dn):
        gradients = conv_backward_op(dy, dn, *ctx.saved_tensors, *ctx.options)
        gradients = tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return *gradients, *[None] * 5


def _pooled_forward(x, norm_weight, norm_bias, height, width, prefix, region_height, region_width, eps, dtype):
    from kernels.layer_norm import triton as fused

    grid, region = (height, width, prefix), (region_height, region_width)
    return fused.pooled_forward(x, norm_weight, norm_bias, grid, region, eps, dtype)


def _norm_backward(dn, x, norm_weight, eps):
    from kernels.layer_norm import triton as fused

    return fused.norm_backward(None, dn, x, norm_weight, eps)


def _fake_pooled_forward(x, norm_weight, norm_bias, height, width, prefix, region_height, region_width, eps, dtype):
    regions = -(-height // region_height) * -(-width // region_width)
    means = x.new_empty(x.shape[0], regions, x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), means


def _fake_norm_backward(dn, x, norm_weight, eps):
    return x.new_empty(x.shape), norm_weight.new_empty(x.shape[2]), norm_weight.new_empty(x.shape[2])


def _no_flops(*_, out_shape=None, **__):
    return 0


pooled_forward_op = define(
    f"pooled_norm_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, {_SIZES}, SymInt region_height, "
    "SymInt region_width, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _pooled_forward,
    _fake_pooled_forward,
    _no_flops,
)
norm_backward_op = define(
    "pooled_norm_backward(Tensor dn, Tensor x, Tensor norm_weight, float eps) -> (Tensor, Tensor, Tensor)",
    _norm_backward,
    _fake_norm_backward,
    _no_flops,
)


class PooledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, height, width, prefix, region_height, region_width, eps, dtype):
        sizes = (height, width, prefix, region_height, region_width)
        n, means = pooled_forward_op(x, norm_weight, norm_bias, *sizes, eps, dtype)
        ctx.save_for_backward(x, norm_weight)
        ctx.mark_non_differentiable(means)
        ctx.eps = eps
        return n, means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dn, _):
        return *norm_backward_op(dn, *ctx.saved_tensors, ctx.eps), *[None] * 7
