"""Layer normalisation where it saves a pass over memory: behind a position encoding, and in front of a router.

    conv_norm:    y = x + conv(x) + bias,  n = LayerNorm(y)
    pooled_norm:  n = LayerNorm(x),  means = mean of n over each region of the map

x is (B, N, C) with N = prefix + H·W tokens in row-major order and may be strided; conv is depth-wise with its own k×k
weights per channel, zero padding, and passes by the prefix tokens, for which y = x. A program holds all channels of a
token, so that x is read once. Statistics, sums and means are float32. LayerNorm(y) = (y - mean) / √(var + ε) · w + b.

Source: Ba et al., 2016, arXiv:1607.06450; conditional position encoding, Chu et al., arXiv:2102.10882, as in DaViT,
Ding et al., arXiv:2204.03645; region means as BiFormer routes by, Zhu et al., CVPR 2023, arXiv:2303.08810, equation 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import depthwise_conv
from kernels.dispatch import check_tensors, is_fused
from kernels.operation import Cost, Operation
from kernels.registration import define

CONV_WHO = "conv_norm"
POOLED_WHO = "pooled_norm"
WIDEST = 1024


def conv_norm(
    x_BNC: Tensor,
    grid: tuple[int, ...],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y = x + conv(x) + bias` in the dtype of x, and `LayerNorm(y)` in that dtype or autocast's; both (B, N, C).

    Args:
        x_BNC: tokens, prefix first.
        grid: (height, width) or (height, width, prefix).
        conv_weight: (C, 1, k, k) as in `nn.Conv2d`, k odd.
        conv_bias: (C,), or None.
        norm_weight: (C,).
        norm_bias: (C,).
        eps: added to the variance.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; more than 1024 channels or a kernel side above 7
            on the fused path.
    """
    C, k = _check(CONV_WHO, x_BNC, grid, norm_weight, norm_bias), conv_weight.shape[-1]
    if tuple(conv_weight.shape) != (C, 1, k, k) or k % 2 == 0:
        raise ValueError(
            f"{CONV_WHO}: conv_weight must be ({C}, 1, k, k) with odd k, got {tuple(conv_weight.shape)}; see nn.Conv2d"
        )
    if conv_bias is not None and tuple(conv_bias.shape) != (C,):
        raise ValueError(f"{CONV_WHO}: conv_bias must be ({C},), got {tuple(conv_bias.shape)}; see nn.Conv2d")
    if not is_fused(CONV_WHO, backend, x_BNC):
        return conv_reference(x_BNC, grid, conv_weight, conv_bias, norm_weight, norm_bias, eps=eps)
    parameters = {"conv_weight": conv_weight, "conv_bias": conv_bias, "norm_weight": norm_weight}
    check_tensors(CONV_WHO, {"x": x_BNC}, {**parameters, "norm_bias": norm_bias})
    _check_width(CONV_WHO, C)
    if k > depthwise_conv.LARGEST:
        raise ValueError(
            f"{CONV_WHO}: the kernels go up to {depthwise_conv.LARGEST}x{depthwise_conv.LARGEST} weights, got {k}; use "
            "backend=torch"
        )
    sizes = (grid[0], grid[1], sum(grid[2:]))
    return _ConvNorm.apply(x_BNC, conv_weight, conv_bias, norm_weight, norm_bias, *sizes, eps, _norm_dtype(x_BNC))


def conv_reference(
    x_BNC: Tensor,
    grid: tuple[int, ...],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch."""
    y_BNC = depthwise_conv.reference(x_BNC, grid, conv_weight, conv_bias, residual=x_BNC)
    return y_BNC, _norm(y_BNC, norm_weight, norm_bias, eps)


def pooled_norm(
    x_BNC: Tensor,
    grid: tuple[int, ...],
    region: tuple[int, int],
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`LayerNorm(x)` (B, N, C) in the dtype of x or autocast's, and its region means (B, R, C) in float32.

    The means carry no gradient: they are there to choose by.

    Args:
        x_BNC: tokens, prefix first; prefix tokens belong to no region.
        grid: (height, width) or (height, width, prefix).
        region: height and width of a region in tokens. Regions are numbered row by row; those at the bottom and at the
            right may lie partly outside the map, and have the mean of the cells inside.
        norm_weight: (C,).
        norm_bias: (C,).
        eps: added to the variance.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or more than 1024 channels on the fused path.
    """
    C = _check(POOLED_WHO, x_BNC, grid, norm_weight, norm_bias)
    if len(region) != 2 or min(region) < 1:
        raise ValueError(
            f"{POOLED_WHO}: region must be a height and a width of at least 1, got {region}; give the tokens on a side"
        )
    if not is_fused(POOLED_WHO, backend, x_BNC):
        return pooled_reference(x_BNC, grid, region, norm_weight, norm_bias, eps=eps)
    check_tensors(POOLED_WHO, {"x": x_BNC}, {"norm_weight": norm_weight, "norm_bias": norm_bias})
    _check_width(POOLED_WHO, C)
    sizes = (grid[0], grid[1], sum(grid[2:]), *region)
    return _PooledNorm.apply(x_BNC, norm_weight, norm_bias, *sizes, eps, _norm_dtype(x_BNC))


def pooled_reference(
    x_BNC: Tensor,
    grid: tuple[int, ...],
    region: tuple[int, int],
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch."""
    n_BNC = _norm(x_BNC, norm_weight, norm_bias, eps)
    map_BCHW = n_BNC.detach()[:, sum(grid[2:]) :].unflatten(1, grid[:2]).permute(0, 3, 1, 2)
    map_BCHW = map_BCHW if map_BCHW.dtype == torch.float64 else map_BCHW.float()
    means_BCHW = F.avg_pool2d(map_BCHW, region, ceil_mode=True, count_include_pad=False)
    return n_BNC, means_BCHW.flatten(2).transpose(1, 2).contiguous()


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def _norm_dtype(x: Tensor) -> torch.dtype:
    """Of the normalised tokens, which go into matrix products: autocast's where it is on. y stays as precise as x."""
    if x.dtype == torch.float32 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _check(who: str, x: Tensor, grid: tuple[int, ...], weight: Tensor, bias: Tensor) -> int:
    """The number of channels."""
    prefix = sum(grid[2:])
    if x.dim() != 3 or x.shape[1] != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"{who}: x must be (B, {prefix} + {grid[0]}*{grid[1]}, C), got {tuple(x.shape)}; pass the grid of this map"
        )
    for name, parameter in (("norm_weight", weight), ("norm_bias", bias)):
        if tuple(parameter.shape) != (x.shape[2],):
            raise ValueError(
                f"{who}: {name} must be ({x.shape[2]},), got {tuple(parameter.shape)}; give one number per channel"
            )
    return x.shape[2]


def _check_width(who: str, channels: int) -> None:
    if channels > WIDEST:
        raise ValueError(f"{who}: the kernels take at most {WIDEST} channels, got {channels}; use backend=torch")


# Registration


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


class _ConvNorm(torch.autograd.Function):
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


class _PooledNorm(torch.autograd.Function):
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


# Shapes for the tests and the benchmark


def conv_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    dim: int,
    kernel: int = 3,
    bias: bool = True,
) -> dict:
    """Keyword arguments of `conv_norm`; parameters are float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "x_BNC": random(batch, sum(grid[2:]) + grid[0] * grid[1], dim, dtype=dtype).requires_grad_(),
        "grid": grid,
        "conv_weight": (random(dim, 1, kernel, kernel) / kernel).requires_grad_(),
        "conv_bias": random(dim).requires_grad_() if bias else None,
        "norm_weight": random(dim).requires_grad_(),
        "norm_bias": random(dim).requires_grad_(),
    }


def pooled_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    region: tuple[int, int],
    **shape,
) -> dict:
    """Keyword arguments of `pooled_norm`; parameters are float32."""
    given = conv_inputs(device, dtype, seed, **shape)
    return {name: given[name] for name in ("x_BNC", "grid", "norm_weight", "norm_bias")} | {"region": region}


def conv_cost(itemsize: int, *, batch: int, grid: tuple[int, ...], dim: int, kernel: int = 3, **_) -> Cost:
    """Forward reads x and writes y and n; backward reads x, y and their gradients and writes that of x."""
    tensor = batch * (sum(grid[2:]) + grid[0] * grid[1]) * dim
    flops = 2 * batch * grid[0] * grid[1] * dim * kernel**2
    return Cost(3 * tensor * itemsize, 5 * tensor * itemsize, flops, 2 * flops)


def pooled_cost(itemsize: int, *, batch: int, grid: tuple[int, ...], dim: int, region: tuple[int, int], **_) -> Cost:
    """Forward reads x and writes n and the means; backward reads x and the gradient and writes that of x."""
    tensor = batch * (sum(grid[2:]) + grid[0] * grid[1]) * dim
    means = batch * -(-grid[0] // region[0]) * -(-grid[1] // region[1]) * dim
    return Cost(2 * tensor * itemsize + 4 * means, 3 * tensor * itemsize, 0, 0)


CONV_CHECKS = {
    "7x7": {"batch": 1, "grid": (7, 7), "dim": 72},
    "one token": {"batch": 1, "grid": (1, 1), "dim": 16},
    "9x7 with prefix, wide": {"batch": 1, "grid": (9, 7, 2), "dim": 24, "kernel": 5},
    "5x20, no bias": {"batch": 1, "grid": (5, 20), "dim": 96, "bias": False},
    "13 tokens, 7x7 weights": {"batch": 1, "grid": (1, 13), "dim": 48, "kernel": 7},
    "3x3, many channels": {"batch": 1, "grid": (3, 3), "dim": 600},
}
CONV_STAGES = {
    "224 px stage 1 (DaViT-B)": {"batch": 128, "grid": (56, 56), "dim": 128},
    "224 px stage 2 (DaViT-B)": {"batch": 128, "grid": (28, 28), "dim": 256},
    "224 px stage 3 (DaViT-B)": {"batch": 128, "grid": (14, 14), "dim": 512},
    "224 px stage 4 (DaViT-B)": {"batch": 128, "grid": (7, 7), "dim": 1024},
    "224 px stage 1 (BiFormer-B)": {"batch": 128, "grid": (56, 56), "dim": 96},
    "224 px stage 3 (BiFormer-B)": {"batch": 128, "grid": (14, 14), "dim": 384},
    "1024 px stage 1": {"batch": 8, "grid": (256, 256), "dim": 128},
    "224 px stage 3, one image": {"batch": 1, "grid": (14, 14), "dim": 512},
}
POOLED_CHECKS = {
    "7x7 in 4x4": {"batch": 2, "grid": (7, 7), "dim": 72, "region": (4, 4)},
    "one token": {"batch": 1, "grid": (1, 1), "dim": 16, "region": (1, 1)},
    "9x7 with prefix in 4x2": {"batch": 1, "grid": (9, 7, 2), "dim": 24, "region": (4, 2)},
    "10x10 in one": {"batch": 1, "grid": (10, 10), "dim": 96, "region": (16, 16)},
    "4x6, many channels": {"batch": 1, "grid": (4, 6), "dim": 600, "region": (2, 3)},
}
POOLED_STAGES = {
    "224 px stage 1 (BiFormer-B)": {"batch": 128, "grid": (56, 56), "dim": 96, "region": (8, 8)},
    "224 px stage 2 (BiFormer-B)": {"batch": 128, "grid": (28, 28), "dim": 192, "region": (4, 4)},
    "224 px stage 3 (BiFormer-B)": {"batch": 128, "grid": (14, 14), "dim": 384, "region": (2, 2)},
    "512 px stage 1": {"batch": 16, "grid": (128, 128), "dim": 96, "region": (16, 16)},
    "1024 px stage 1": {"batch": 8, "grid": (256, 256), "dim": 96, "region": (32, 32)},
    "224 px stage 3, one image": {"batch": 1, "grid": (14, 14), "dim": 384, "region": (2, 2)},
}


def _channels_first(x_BNC: Tensor, grid: tuple[int, ...], conv_weight, conv_bias, norm_weight, norm_bias, eps=1e-6):
    """As the authors' codes do it: a contiguous (B, C, H, W) map, conv2d, back, add, and the norm."""
    x_BCHW = x_BNC.transpose(1, 2).unflatten(2, grid[:2]).contiguous()
    bias = None if conv_bias is None else conv_bias.to(x_BNC.dtype)
    conv = F.conv2d(
        x_BCHW, conv_weight.to(x_BNC.dtype), bias, padding=conv_weight.shape[-1] // 2, groups=x_BNC.shape[2]
    )
    y_BNC = x_BNC + conv.flatten(2).transpose(1, 2)
    return y_BNC, _norm(y_BNC, norm_weight, norm_bias, eps)


def _windowed(x_BNC: Tensor, grid: tuple[int, ...], region, norm_weight, norm_bias, eps=1e-6):
    """As the authors' code does it: the norm, a copy in the order of regions, and its mean."""
    n_BNC = _norm(x_BNC, norm_weight, norm_bias, eps)
    split = n_BNC.detach().unflatten(1, (grid[0] // region[0], region[0], grid[1] // region[1], region[1]))
    return n_BNC, split.transpose(2, 3).flatten(3, 4).flatten(1, 2).contiguous().mean(2, dtype=torch.float32)


OPERATION = Operation(
    name=CONV_WHO,
    run=conv_norm,
    reference=conv_reference,
    inputs=conv_inputs,
    checks=CONV_CHECKS,
    stages=CONV_STAGES,
    cost=conv_cost,
    baselines={"official": _channels_first, "pytorch": conv_reference},
)
POOLED = Operation(
    name=POOLED_WHO,
    run=pooled_norm,
    reference=pooled_reference,
    inputs=pooled_inputs,
    checks=POOLED_CHECKS,
    stages=POOLED_STAGES,
    cost=pooled_cost,
    baselines={"official": _windowed, "pytorch": pooled_reference},
)
OPERATIONS = (OPERATION, POOLED)
