"""The operators of the gated convolution: launches, fake results, FLOPs and gradients."""

from kernels.registration import define, differentiable


def _forward(x, weight, bias, height, width, prefix):
    from kernels.gated_conv import triton as fused

    return fused.forward(x, weight, bias, (height, width, prefix))


def _backward(grad, x, weight, bias, height, width, prefix):
    from kernels.gated_conv import triton as fused

    return fused.backward(grad, x, weight, bias, (height, width, prefix))


def _fake_forward(x, weight, bias, height, width, prefix):
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


def _fake_backward(grad, x, weight, bias, height, width, prefix):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _flops(x, weight, bias, height, width, *_, out_shape=None, **__):
    return 2 * x[0] * height * width * weight[0] * weight[-1] ** 2


def _flops_backward(grad, x, weight, bias, height, width, *_, out_shape=None, **__):
    return 4 * x[0] * height * width * weight[0] * weight[-1] ** 2


_SIZES = "SymInt height, SymInt width, int prefix"
forward_op = define(
    f"gated_conv_forward(Tensor x, Tensor weight, Tensor? bias, {_SIZES}) -> Tensor", _forward, _fake_forward, _flops
)
backward_op = define(
    f"gated_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, {_SIZES}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


def _kept(arguments: tuple, results: tuple) -> tuple:
    return arguments


convolve_and_gate = differentiable(forward_op, backward_op, _kept)
