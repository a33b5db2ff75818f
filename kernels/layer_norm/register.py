"""The operators of layer norm: launches, fake results, FLOPs and gradients."""

from kernels.registration import define, differentiable


def _conv_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, height, width, prefix, eps, dtype):
    from kernels.layer_norm import triton as fused

    grid = (height, width, prefix)
    return fused.conv_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, grid, eps, dtype)


def _conv_backward(dy, dn, x, y, conv_weight, norm_weight, height, width, prefix, eps, needed):
    from kernels.layer_norm import triton as fused

    return fused.conv_backward(dy, dn, x, y, conv_weight, norm_weight, (height, width, prefix), eps, needed)


def _fake_conv_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, height, width, prefix, eps, dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


def _fake_conv_backward(dy, dn, x, y, conv_weight, norm_weight, height, width, prefix, eps, needed):
    weight = conv_weight.new_empty(conv_weight.shape if any(needed[1:3]) else 0)
    vectors = (p.new_empty(p.shape[0]) for p in (weight, norm_weight, norm_weight))
    return x.new_empty(x.shape if needed[0] else 0), weight, *vectors


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
    "conv_norm_backward(Tensor? dy, Tensor? dn, Tensor x, Tensor y, Tensor conv_weight, Tensor norm_weight, "
    f"{_SIZES}, float eps, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv_backward,
    _fake_conv_backward,
    _flops_backward,
)


def _kept(arguments: tuple, results: tuple) -> tuple:
    x, conv_weight, _, norm_weight, _, *sizes, _ = arguments
    return x, results[0], conv_weight, norm_weight, *sizes


convolve_and_norm = differentiable(conv_forward_op, conv_backward_op, _kept, outputs=2, selective=True)
