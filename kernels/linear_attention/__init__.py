"""Linear attention: every query reads one D×D state per head that sums up all keys and values. Linear in tokens.

With a feature map φ, means over the N tokens of an image, and a depth-wise convolution of the values on the map:
    focused   o = φ(q) S / (φ(q)·z + 1e-6) + conv(v),   S = mean φ(k)ᵀ v,   z = mean φ(k)
              φ(x) = ‖b‖ / ‖bᵖ‖ · bᵖ with b = (relu(x) + 1e-6) / scale, both norms over all C channels of a token
    inline    o = s q Cov(k, v) + mean v + conv(v),   Cov = mean (k - mean k)ᵀ (v - mean v)
    linear    o = φ(q) Σ φ(k)ᵀ v / (φ(q)·Σ φ(k) + 1e-6) + conv(v),   φ = relu, elu + 1 or the identity
Features, states and quotients are in float32 for half precision. Forward moves q, k, v and o once and v once more for
the convolution; kept for backward is, besides the input, the state and four numbers per token.

Source: FLatten Transformer, Han et al., ICCV 2023, arXiv:2308.00442, equations 4 to 7, where the authors' code is
followed in its norms over C; Bridging the Divide (InLine), Han et al., NeurIPS 2024, arXiv:2412.06590, its subtraction
normalisation as the covariance that it equals; Transformers are RNNs, Katharopoulos et al., 2020, arXiv:2006.16236.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.depthwise_conv import LARGEST
from kernels.depthwise_conv import reference as convolve
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.linear_attention.register import attend

FOCUSED, INLINE_WHO, WHO = "focused_linear_attention", "inline_attention", "linear_attention"
FEATURES = ("relu", "elu", "identity")
EPS = 1e-6


def focused_linear_attention(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    *,
    power: float = 3.0,
    scale_C: Tensor,
    position_NC: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`f(q) mean(f(k)ᵀ v) / (f(q)·mean f(k) + 1e-6) + conv(v)` per head, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC: a packed projection (B, N, 3C), prefix tokens first; it may be strided.
        grid: (height, width) or (height, width, prefix); prefix tokens attend, and take no part in the convolutions.
        num_heads: number of heads M.
        power: the focusing factor p, at least 1. Finite for any power: channels are divided by the largest first.
        scale_C: positive, divides queries and keys; `softplus` of the learned parameter.
        position_NC: (N, C) added to the keys, or None.
        weight, bias: of the convolution that all heads share, (D, 1, k, k) with odd k and (D,), or None.
        lepe_weight, lepe_bias: of a second one, (C, 1, 3, 3) and (C,), or None.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a power below 1, or on the fused path more than
            128 channels per head or a kernel side above 7.
    """
    C = _check(FOCUSED, qkv_BNC, grid, num_heads)
    _check_shape(FOCUSED, "scale_C", scale_C, (C,))
    _check_shape(FOCUSED, "position_NC", position_NC, (qkv_BNC.shape[1], C))
    _check_convolution(FOCUSED, "", weight, bias, C // num_heads)
    _check_convolution(FOCUSED, "lepe_", lepe_weight, lepe_bias, C, 3)
    if power < 1:
        raise ValueError(f"{FOCUSED}: power must be at least 1, got {power}; the paper uses 3")
    parameters = {"scale_C": scale_C, "position_NC": position_NC, "weight": weight, "bias": bias}
    parameters |= {"lepe_weight": lepe_weight, "lepe_bias": lepe_bias}
    if not is_fused(FOCUSED, backend, qkv_BNC):
        return focused_reference(qkv_BNC, grid, num_heads, power=power, **parameters)
    return _fused(FOCUSED, qkv_BNC, grid, num_heads, "focused", float(power), True, **parameters)


def inline_attention(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    *,
    scale: float | None = None,
    dynamic_weight_BC33: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`scale · q Cov(k, v) + mean v + conv(v)` per head, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC, grid, num_heads, backend: as in `focused_linear_attention`.
        scale: of the queries, D^-1/2 by default.
        dynamic_weight_BC33: 3×3 weights of the convolution for every image and channel, (B, C, 3, 3), or None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or more than 128 channels per head on the fused
            path.
    """
    C = _check(INLINE_WHO, qkv_BNC, grid, num_heads)
    _check_shape(INLINE_WHO, "dynamic_weight_BC33", dynamic_weight_BC33, (qkv_BNC.shape[0], C, 3, 3))
    scale = (C // num_heads) ** -0.5 if scale is None else scale
    if not is_fused(INLINE_WHO, backend, qkv_BNC):
        return inline_reference(qkv_BNC, grid, num_heads, scale=scale, dynamic_weight_BC33=dynamic_weight_BC33)
    return _fused(INLINE_WHO, qkv_BNC, grid, num_heads, "inline", float(scale), False, weight=dynamic_weight_BC33)


def linear_attention(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    *,
    feature: str = "relu",
    normalise: bool = True,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`φ(q) Σ φ(k)ᵀ v / (φ(q)·Σ φ(k) + 1e-6) + conv(v)` per head, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC, grid, num_heads, backend: as in `focused_linear_attention`.
        feature: φ is "relu", "elu" (elu + 1) or "identity".
        normalise: divide; otherwise the numerator alone.
        weight, bias: of the convolution, (C, 1, k, k) with odd k and (C,), or None.

    Raises:
        ValueError: an unknown feature; otherwise as `focused_linear_attention`.
    """
    C = _check(WHO, qkv_BNC, grid, num_heads)
    _check_convolution(WHO, "", weight, bias, C)
    if feature not in FEATURES:
        raise ValueError(f"{WHO}: feature must be {', '.join(FEATURES)}, got {feature}; choose one of them")
    if not is_fused(WHO, backend, qkv_BNC):
        return linear_reference(
            qkv_BNC, grid, num_heads, feature=feature, normalise=normalise, weight=weight, bias=bias
        )
    return _fused(WHO, qkv_BNC, grid, num_heads, feature, 1.0, normalise, weight=weight, bias=bias)


# The definitions in plain PyTorch


def focused_reference(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    *,
    power: float = 3.0,
    scale_C: Tensor,
    position_NC: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
) -> Tensor:
    """The definition of `focused_linear_attention`."""
    q, k, v = _wide(qkv_BNC)
    with _full_precision(qkv_BNC.device):
        k = k if position_NC is None else k + position_NC.to(k.dtype)
        q, k = (heads_of(_focused((x.relu() + EPS) / scale_C.to(x.dtype), power), num_heads) for x in (q, k))
        state_BMDD = k.mT @ (heads_of(v, num_heads) / k.shape[2])
        o_BMND = q @ state_BMDD / (q @ k.mean(2, keepdim=True).mT + EPS)
    o_BNC = merged(o_BMND).to(qkv_BNC.dtype)
    if weight is not None:
        weight = weight.repeat(num_heads, 1, 1, 1)
        bias = None if bias is None else bias.repeat(num_heads)
    return with_convolution(with_convolution(o_BNC, qkv_BNC, grid, weight, bias), qkv_BNC, grid, lepe_weight, lepe_bias)


def inline_reference(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    *,
    scale: float | None = None,
    dynamic_weight_BC33: Tensor | None = None,
) -> Tensor:
    """The definition of `inline_attention`."""
    q, k, v = (heads_of(x, num_heads) for x in _wide(qkv_BNC))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with _full_precision(qkv_BNC.device):
        mean_v = v.mean(2, keepdim=True)
        covariance_BMDD = (k - k.mean(2, keepdim=True)).mT @ ((v - mean_v) / k.shape[2])
        o_BNC = merged(q * scale @ covariance_BMDD + mean_v).to(qkv_BNC.dtype)
    if dynamic_weight_BC33 is None:
        return o_BNC
    height, width, prefix = (*grid, 0)[:3]
    B, _, C = o_BNC.shape
    if B == 0:  # conv2d refuses no groups
        return o_BNC + dynamic_weight_BC33.sum()
    v_BCHW = qkv_BNC[:, prefix:, 2 * C :].transpose(1, 2).reshape(1, B * C, height, width)
    weight = dynamic_weight_BC33.to(o_BNC.dtype).reshape(B * C, 1, 3, 3)
    local_BNC = F.conv2d(v_BCHW, weight, padding=1, groups=B * C).view(B, C, -1).transpose(1, 2)
    return o_BNC + F.pad(local_BNC, (0, 0, prefix, 0))


def linear_reference(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    *,
    feature: str = "relu",
    normalise: bool = True,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition of `linear_attention`."""
    q, k, v = (heads_of(x, num_heads) for x in _wide(qkv_BNC))
    with _full_precision(qkv_BNC.device):
        if feature != "identity":
            q, k = (x.relu() if feature == "relu" else F.elu(x) + 1 for x in (q, k))
        o_BMND = q @ (k.mT @ v)
        if normalise:
            o_BMND = o_BMND / (q @ k.sum(2, keepdim=True).mT + EPS)
    return with_convolution(merged(o_BMND).to(qkv_BNC.dtype), qkv_BNC, grid, weight, bias)


def _focused(b_BNC: Tensor, power: float) -> Tensor:
    """‖b‖ / ‖bᵖ‖ · bᵖ; b is divided by its largest channel first, which cancels, so that no power leaves the range."""
    peak = b_BNC.detach().amax(-1, keepdim=True)
    sharp = (b_BNC / peak) ** power
    norm = torch.linalg.vector_norm
    return sharp * (norm(b_BNC, dim=-1, keepdim=True) / norm(sharp, dim=-1, keepdim=True))


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast off inside; there is none to switch off on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _wide(qkv_BNC: Tensor) -> tuple[Tensor, ...]:
    return qkv_BNC.to(torch.promote_types(qkv_BNC.dtype, torch.float32)).chunk(3, -1)


def heads_of(x_BNC: Tensor, num_heads: int) -> Tensor:
    return x_BNC.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merged(x_BMND: Tensor) -> Tensor:
    return x_BMND.transpose(1, 2).flatten(2)


def with_convolution(o_BNC: Tensor, qkv_BNC: Tensor, grid, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    v_BNC = qkv_BNC[..., 2 * o_BNC.shape[2] :]
    return o_BNC if weight is None else o_BNC + convolve(v_BNC, grid, weight, bias)


# Checks


def _check(who: str, qkv: Tensor, grid: tuple[int, ...], num_heads: int) -> int:
    """Number of channels C."""
    prefix = grid[2] if len(grid) > 2 else 0
    if num_heads < 1 or qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"{who}: qkv must be (B, N, 3 * {num_heads} heads * D), got {tuple(qkv.shape)}; pass the output of "
            "nn.Linear(C, 3 * C) and a number of heads that divides C"
        )
    if qkv.shape[1] != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"{who}: qkv must have {prefix} + {grid[0]}*{grid[1]} tokens, got {qkv.shape[1]}; pass the grid of this map"
        )
    return qkv.shape[2] // 3


def _check_shape(who: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{who}: {name} must be {shape}, got {tuple(tensor.shape)}; see the docstring")


def _check_convolution(who: str, name: str, weight, bias, channels: int, side: int | None = None) -> None:
    if weight is None and bias is not None:
        raise ValueError(f"{who}: {name}bias needs {name}weight, got only {name}bias; give both or none")
    if weight is None:
        return
    k = side or weight.shape[-1]
    if tuple(weight.shape) != (channels, 1, k, k) or k % 2 == 0:
        wanted = f"({channels}, 1, {side}, {side})" if side else f"({channels}, 1, k, k) with odd k"
        raise ValueError(f"{who}: {name}weight must be {wanted}, got {tuple(weight.shape)}; see nn.Conv2d")
    _check_shape(who, f"{name}bias", bias, (channels,))


def _fused(
    who: str,
    qkv: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    feature: str,
    constant: float,
    normalise: bool,
    *,
    scale_C: Tensor | None = None,
    position_NC: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
) -> Tensor:
    (qkv,) = autocast(qkv)
    parameters = {"scale_C": scale_C, "position_NC": position_NC, "weight": weight, "bias": bias}
    parameters |= {"lepe_weight": lepe_weight, "lepe_bias": lepe_bias}
    check_tensors(who, {"qkv": qkv}, parameters)
    check_head_dim(who, qkv.shape[2] // (3 * num_heads))
    if weight is not None and weight.shape[-1] > LARGEST:
        raise ValueError(
            f"{who}: the kernels go up to {LARGEST}x{LARGEST} weights, got {weight.shape[-1]}; use backend=torch"
        )
    sizes = (*grid, 0)[:3]
    return attend(qkv, *parameters.values(), *sizes, num_heads, feature, constant, normalise)
