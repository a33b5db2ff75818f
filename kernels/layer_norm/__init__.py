"""Layer normalisation where it saves a pass over memory: behind a position encoding.

    y = x + conv(x) + bias,  n = LayerNorm(y)

x is (B, N, C) with N = prefix + H·W tokens in row-major order and may be strided; conv is depth-wise with its own k×k
weights per channel, zero padding, and passes by the prefix tokens, for which y = x. A program holds all channels of a
token, so that x is read once. Statistics and sums are float32. LayerNorm(y) = (y - mean) / √(var + ε) · w + b.

Source: Ba et al., 2016, arXiv:1607.06450; conditional position encoding, Chu et al., arXiv:2102.10882, as in DaViT,
Ding et al., arXiv:2204.03645.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import depthwise_conv
from kernels.dispatch import check_tensors, is_fused
from kernels.layer_norm.register import convolve_and_norm

WHO = "conv_norm"
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
    C, k = _check(WHO, x_BNC, grid, norm_weight, norm_bias), conv_weight.shape[-1]
    if tuple(conv_weight.shape) != (C, 1, k, k) or k % 2 == 0:
        raise ValueError(
            f"{WHO}: conv_weight must be ({C}, 1, k, k) with odd k, got {tuple(conv_weight.shape)}; see nn.Conv2d"
        )
    if conv_bias is not None and tuple(conv_bias.shape) != (C,):
        raise ValueError(f"{WHO}: conv_bias must be ({C},), got {tuple(conv_bias.shape)}; see nn.Conv2d")
    if not is_fused(WHO, backend, x_BNC):
        return definition(x_BNC, grid, conv_weight, conv_bias, norm_weight, norm_bias, eps=eps)
    parameters = {"conv_weight": conv_weight, "conv_bias": conv_bias, "norm_weight": norm_weight}
    check_tensors(WHO, {"x": x_BNC}, {**parameters, "norm_bias": norm_bias})
    _check_width(WHO, C)
    if k > depthwise_conv.LARGEST:
        raise ValueError(
            f"{WHO}: the kernels go up to {depthwise_conv.LARGEST}x{depthwise_conv.LARGEST} weights, got {k}; use "
            "backend=torch"
        )
    sizes = (grid[0], grid[1], sum(grid[2:]))
    return convolve_and_norm(x_BNC, conv_weight, conv_bias, norm_weight, norm_bias, *sizes, eps, _norm_dtype(x_BNC))


def definition(
    x_BNC: Tensor,
    grid: tuple[int, ...],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The encoded tokens and their norm, the parameters in the dtype of x."""
    y_BNC = depthwise_conv.definition(x_BNC, grid, conv_weight, conv_bias, residual=x_BNC)
    return y_BNC, normalised(y_BNC, norm_weight, norm_bias, eps)


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
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
