"""Linear attention: every query reads one D×D state per head that sums up all keys and values. Linear in tokens.

With a feature map φ, means over the N tokens of an image, and a depth-wise convolution of the values on the map:
    focused   o = φ(q) S / (φ(q)·z + 1e-6) + conv(v),   S = mean φ(k)ᵀ v,   z = mean φ(k)
              φ(x) = ‖b‖ / ‖bᵖ‖ · bᵖ with b = (relu(x) + 1e-6) / scale, both norms over all C channels of a token
    inline    o = s q Cov(k, v) + mean v + conv(v),   Cov = mean (k - mean k)ᵀ (v - mean v)
Features, states and quotients are in float32 for half precision. Forward moves q, k, v and o once, and v and o once
more for the convolution of "focused"; kept for backward is, besides the input, the state and four numbers per token.

Source: FLatten Transformer, Han et al., ICCV 2023, arXiv:2308.00442, equations 4 to 7, where the authors' code is
followed in its norms over C; Bridging the Divide (InLine), Han et al., NeurIPS 2024, arXiv:2412.06590, its subtraction
normalisation as the covariance that it equals.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.depthwise_conv import LARGEST
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.heads import heads_to_map, map_to_heads, merge_heads, split_heads
from kernels.linear_attention.register import attend
from kernels.precision import full_precision, wide

FOCUSED, INLINE = "focused_linear_attention", "inline_attention"
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
        del parameters["position_NC"]
        position_MSD = None if position_NC is None else split_heads(position_NC[None], 1, num_heads)[0][0]
        heads, options = split_heads(qkv_BNC, 3, num_heads), {"power": power, "position_MSD": position_MSD}
        return merge_heads(focused_definition(*heads, grid, grid, **options, **parameters))
    return _fused(FOCUSED, qkv_BNC, grid, num_heads, "focused", float(power), **parameters)


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
    C = _check(INLINE, qkv_BNC, grid, num_heads)
    _check_shape(INLINE, "dynamic_weight_BC33", dynamic_weight_BC33, (qkv_BNC.shape[0], C, 3, 3))
    scale = (C // num_heads) ** -0.5 if scale is None else scale
    if not is_fused(INLINE, backend, qkv_BNC):
        heads, options = split_heads(qkv_BNC, 3, num_heads), {"dynamic_weight_BC33": dynamic_weight_BC33}
        return merge_heads(inline_definition(*heads, grid, grid, scale=scale, **options))
    return _fused(INLINE, qkv_BNC, grid, num_heads, "inline", float(scale), weight=dynamic_weight_BC33)


def focused_definition(
    q_BMND: Tensor,
    k_BMSD: Tensor,
    v_BMSD: Tensor,
    grid: tuple[int, ...],
    kv_grid: tuple[int, ...],
    *,
    power: float,
    scale_C: Tensor,
    position_MSD: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
) -> Tensor:
    """`focused_linear_attention` of heads, (B, M, N, D), whose keys may come from a smaller map than the queries."""
    with full_precision(q_BMND.device):
        q, k = focused_features(q_BMND, k_BMSD, power, scale_C, position_MSD)
        state_BMDD = k.mT @ v_BMSD.to(k.dtype) / k.shape[2]
        o_BMND = q @ state_BMDD / (q @ k.mean(2, keepdim=True).mT + EPS)
    o_BMND = o_BMND.to(v_BMSD.dtype)
    convolutions = [(w, b) for w, b in ((weight, bias), (lepe_weight, lepe_bias)) if w is not None]
    return o_BMND + focused_local(v_BMSD, grid, kv_grid, *convolutions) if convolutions else o_BMND


def focused_features(
    q_BMND: Tensor, k_BMSD: Tensor, power: float, scale_C: Tensor, position_MSD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """f(Q) (B, M, N, D) and f(K) (B, M, S, D), in float32 at least."""
    q, k = wide(q_BMND), wide(k_BMSD)
    k = k if position_MSD is None else k + position_MSD.to(k.dtype)
    scale_M1D = scale_C.to(q.dtype).view(q.shape[1], 1, -1)
    return focus((q.relu() + EPS) / scale_M1D, power), focus((k.relu() + EPS) / scale_M1D, power)


def focus(x_BMND: Tensor, power: float) -> Tensor:
    """`‖x‖ / ‖xᵖ‖ · xᵖ` over heads and channels together, for positive x: other direction, same length.

    x is divided by its largest channel first. That factor cancels, so the result is the same, but no power leaves the
    range of the number format: p = 32 or a token of 1e-6 in every channel give 0 / 0 otherwise.
    """
    peak = x_BMND.detach().amax((1, 3), keepdim=True)
    below_one = x_BMND / peak
    sharp = below_one**power
    return sharp * (_norm(below_one) * peak / _norm(sharp))


def _norm(x_BMND: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_BMND, dim=(1, 3), keepdim=True)


def focused_local(
    v_BMSD: Tensor, grid: tuple[int, ...], kv_grid: tuple[int, ...], *convolutions: tuple[Tensor, Tensor | None]
) -> Tensor:
    """The sum of depth-wise convolutions of the values, (B, M, N, D); zero for prefix tokens.

    Values of a smaller map are enlarged linearly along the row-major sequence, not over the map, as in the authors'
    code. A convolution is its weight and bias, of all channels, or of the D that every head has.
    """
    v_BCHW = heads_to_map(v_BMSD, kv_grid)
    if tuple(kv_grid[:2]) != tuple(grid[:2]):
        v_BCHW = F.interpolate(v_BCHW.flatten(2), size=grid[0] * grid[1], mode="linear").unflatten(2, grid[:2])
    total_BCHW = None
    for weight, bias in convolutions:
        copies = v_BCHW.shape[1] // weight.shape[0]
        weight = weight.repeat(copies, 1, 1, 1).to(v_BCHW.dtype)
        bias = None if bias is None else bias.repeat(copies).to(v_BCHW.dtype)
        y_BCHW = F.conv2d(v_BCHW, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        total_BCHW = y_BCHW if total_BCHW is None else total_BCHW + y_BCHW
    return map_to_heads(total_BCHW, v_BMSD.shape[1], sum(grid[2:]))


def inline_definition(
    q_BMND: Tensor,
    k_BMSD: Tensor,
    v_BMSD: Tensor,
    grid: tuple[int, ...],
    kv_grid: tuple[int, ...],
    *,
    scale: float,
    dynamic_weight_BC33: Tensor | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
) -> Tensor:
    """`inline_attention` of heads, (B, M, N, D) in the dtype of the values.

    The keys may come from a smaller map than the queries. A second convolution of the values may be added, the same for
    every image: its weight (C, 1, 3, 3) and bias (C,).
    """
    with full_precision(q_BMND.device):
        q, k, v = wide(q_BMND), wide(k_BMSD), wide(v_BMSD)
        mean_v = v.mean(2, keepdim=True)
        covariance_BMDD = (k - k.mean(2, keepdim=True)).mT @ (v - mean_v) / k.shape[2]
        o_BMND = (mean_v + q @ (scale * covariance_BMDD)).to(v_BMSD.dtype)
    if dynamic_weight_BC33 is None and lepe_weight is None:
        return o_BMND
    return o_BMND + inline_local(v_BMSD, grid, kv_grid, dynamic_weight_BC33, lepe_weight, lepe_bias)


def inline_local(
    v_BMSD: Tensor,
    grid: tuple[int, ...],
    kv_grid: tuple[int, ...],
    dynamic_weight_BC33: Tensor | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
) -> Tensor:
    """The convolutions of the values, (B, M, N, D), enlarged bilinearly from a smaller map; zero for prefix tokens."""
    v_BCHW = heads_to_map(v_BMSD, kv_grid)
    if tuple(kv_grid[:2]) != tuple(grid[:2]):
        v_BCHW = F.interpolate(v_BCHW, size=grid[:2], mode="bilinear")
    B, C = v_BCHW.shape[:2]
    total_BCHW = None
    if lepe_weight is not None:
        weight, bias = (p if p is None else p.to(v_BCHW.dtype) for p in (lepe_weight, lepe_bias))
        total_BCHW = F.conv2d(v_BCHW, weight, bias, padding=1, groups=C)
    if dynamic_weight_BC33 is not None and B:  # conv2d refuses no groups
        dynamic_BCHW = _of_each_image(v_BCHW, dynamic_weight_BC33.to(v_BCHW.dtype))
        total_BCHW = dynamic_BCHW if total_BCHW is None else total_BCHW + dynamic_BCHW
    if total_BCHW is None:
        total_BCHW = torch.zeros_like(v_BCHW)
    return map_to_heads(total_BCHW, v_BMSD.shape[1], sum(grid[2:]))


def _of_each_image(x_BCHW: Tensor, weight_BC33: Tensor) -> Tensor:
    """A depth-wise convolution with weights of its own for every image."""
    B, C, H, W = x_BCHW.shape
    if torch.onnx.is_in_onnx_export():  # where the number of groups, and so of images, would be fixed
        padded = F.pad(x_BCHW, (1, 1, 1, 1))
        places = [(y, x) for y in range(3) for x in range(3)]
        return sum(padded[:, :, y : y + H, x : x + W] * weight_BC33[:, :, y, x, None, None] for y, x in places)
    weight = weight_BC33.reshape(B * C, 1, 3, 3)
    return F.conv2d(x_BCHW.reshape(1, B * C, H, W), weight, padding=1, groups=B * C).view_as(x_BCHW)


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
    return attend(qkv, *parameters.values(), *sizes, num_heads, feature, constant)
