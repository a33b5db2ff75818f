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
from kernels.operation import Cost, Operation
from kernels.registration import define

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
        q, k = (_heads(_focused((x.relu() + EPS) / scale_C.to(x.dtype), power), num_heads) for x in (q, k))
        state_BMDD = k.mT @ (_heads(v, num_heads) / k.shape[2])
        o_BMND = q @ state_BMDD / (q @ k.mean(2, keepdim=True).mT + EPS)
    o_BNC = _merged(o_BMND).to(qkv_BNC.dtype)
    if weight is not None:
        weight = weight.repeat(num_heads, 1, 1, 1)
        bias = None if bias is None else bias.repeat(num_heads)
    return _with_convolution(
        _with_convolution(o_BNC, qkv_BNC, grid, weight, bias), qkv_BNC, grid, lepe_weight, lepe_bias
    )


def inline_reference(
    qkv_BNC: Tensor,
    grid: tuple[int, ...],
    num_heads: int,
    *,
    scale: float | None = None,
    dynamic_weight_BC33: Tensor | None = None,
) -> Tensor:
    """The definition of `inline_attention`."""
    q, k, v = (_heads(x, num_heads) for x in _wide(qkv_BNC))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with _full_precision(qkv_BNC.device):
        mean_v = v.mean(2, keepdim=True)
        covariance_BMDD = (k - k.mean(2, keepdim=True)).mT @ ((v - mean_v) / k.shape[2])
        o_BNC = _merged(q * scale @ covariance_BMDD + mean_v).to(qkv_BNC.dtype)
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
    q, k, v = (_heads(x, num_heads) for x in _wide(qkv_BNC))
    with _full_precision(qkv_BNC.device):
        if feature != "identity":
            q, k = (x.relu() if feature == "relu" else F.elu(x) + 1 for x in (q, k))
        o_BMND = q @ (k.mT @ v)
        if normalise:
            o_BMND = o_BMND / (q @ k.sum(2, keepdim=True).mT + EPS)
    return _with_convolution(_merged(o_BMND).to(qkv_BNC.dtype), qkv_BNC, grid, weight, bias)


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


def _heads(x_BNC: Tensor, num_heads: int) -> Tensor:
    return x_BNC.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _merged(x_BMND: Tensor) -> Tensor:
    return x_BMND.transpose(1, 2).flatten(2)


def _with_convolution(o_BNC: Tensor, qkv_BNC: Tensor, grid, weight: Tensor | None, bias: Tensor | None) -> Tensor:
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
    return _LinearAttention.apply(qkv, *parameters.values(), *sizes, num_heads, feature, constant, normalise)


# Registration: one pair of operators; `constant` is the power of "focused" and the scale of "inline"


def _forward(qkv, scale, position, weight, bias, lepe_weight, lepe_bias, height, width, prefix, *options):
    from kernels.linear_attention import triton as fused

    parameters = (scale, position, weight, bias, lepe_weight, lepe_bias)
    return fused.forward(qkv, *parameters, (height, width, prefix), *options)


def _backward(grad, qkv, state, stats, taps, scale, position, weight, bias, lepe_weight, lepe_bias, height, width,
              prefix, *options):  # fmt: skip
    from kernels.linear_attention import triton as fused

    parameters = (scale, position, weight, bias, lepe_weight, lepe_bias)
    return fused.backward(grad, qkv, state, stats, taps, *parameters, (height, width, prefix), *options)


def _fake_forward(
    qkv, scale, position, weight, bias, lepe_weight, lepe_bias, height, width, prefix, heads, feature, *_
):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = C // heads
    side = max((w.shape[-1] for w in (weight, lepe_weight) if w is not None), default=0)
    images = (B,) if feature == "inline" else ()
    shapes = (
        (B, heads, D + (4 if feature == "inline" else 1), D),
        (4, B, N) if feature == "focused" else (0,),
        (*images, side * side + 1, C) if side else (0,),
    )
    return qkv.new_empty(B, N, C), *(qkv.new_empty(s, dtype=torch.float32) for s in shapes)


def _fake_backward(grad, qkv, state, stats, taps, *others):
    parameters = others[:6]
    return qkv.new_empty(qkv.shape), *(
        qkv.new_empty(0, dtype=torch.float32) if p is None else p.new_empty(p.shape) for p in parameters
    )


def _flops(qkv, scale, position, weight, bias, lepe_weight, lepe_bias, height, width, prefix, heads, *_, **__):
    side = max((w[-1] for w in (weight, lepe_weight) if w is not None), default=0)
    return _count(qkv[0], qkv[1], qkv[2] // 3, heads, height * width, side)


def _flops_backward(grad, qkv, state, stats, taps, scale, position, *rest, **__):
    return 2 * _flops(qkv, scale, position, *rest)


def _count(B: int, N: int, C: int, heads: int, cells: int, side: int) -> int:
    """State and output are 2 N C D each, the convolution 2 H W C k²."""
    return B * C * (4 * N * (C // heads) + 2 * cells * side**2)


_PARAMETERS = "Tensor? scale, Tensor? position, Tensor? weight, Tensor? bias, Tensor? lepe_weight, Tensor? lepe_bias"
_OPTIONS = "SymInt height, SymInt width, int prefix, int heads, str feature, float constant, bool normalise"
forward_op = define(
    f"linear_attention_forward(Tensor qkv, {_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
backward_op = define(
    "linear_attention_backward(Tensor grad, Tensor qkv, Tensor state, Tensor stats, Tensor taps, "
    f"{_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _flops_backward,
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, *others):
        out, state, stats, taps = forward_op(qkv, *others)
        ctx.save_for_backward(qkv, state, stats, taps, *others[:6])
        ctx.options = others[6:]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        dqkv, *gradients = backward_op(grad, *saved, *ctx.options)
        parameters = (None if p is None else g for p, g in zip(saved[4:], gradients, strict=True))
        return dqkv, *parameters, *[None] * len(ctx.options)


# Shapes for the tests and the benchmark


def _random(device: str | torch.device, seed: int):
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return (values * factor).requires_grad_()

    return random


def _tokens(grid: tuple[int, ...]) -> int:
    return sum(grid[2:]) + grid[0] * grid[1]


def focused_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    heads: int,
    dim: int,
    power: float = 3.0,
    kernel: int = 5,
    position: bool = True,
    lepe: bool = False,
    learned: bool = True,
) -> dict:
    """Keyword arguments of `focused_linear_attention`; `dim` = C, kernel 0 is no convolution.

    With one token the result hardly depends on scale and position: no gradients of them where `learned` is false.
    """
    random, N = _random(device, seed), _tokens(grid)
    return {
        "qkv_BNC": random(batch, N, 3 * dim, dtype=dtype),
        "grid": grid,
        "num_heads": heads,
        "power": power,
        "scale_C": F.softplus(random(dim).detach()).requires_grad_(learned),
        "position_NC": random(N, dim, factor=0.5).requires_grad_(learned) if position else None,
        "weight": random(dim // heads, 1, kernel, kernel, factor=0.2) if kernel else None,
        "bias": random(dim // heads) if kernel else None,
        "lepe_weight": random(dim, 1, 3, 3, factor=0.2) if lepe else None,
        "lepe_bias": random(dim) if lepe else None,
    }


def inline_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    heads: int,
    dim: int,
    kernel: int = 3,
) -> dict:
    """Keyword arguments of `inline_attention`; kernel 0 is no convolution."""
    random = _random(device, seed)
    return {
        "qkv_BNC": random(batch, _tokens(grid), 3 * dim, dtype=dtype),
        "grid": grid,
        "num_heads": heads,
        "dynamic_weight_BC33": random(batch, dim, 3, 3, dtype=dtype, factor=0.3) if kernel else None,
    }


def linear_inputs(
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    batch: int,
    grid: tuple[int, ...],
    heads: int,
    dim: int,
    kernel: int = 0,
    feature: str = "relu",
    normalise: bool = True,
) -> dict:
    """Keyword arguments of `linear_attention`; kernel 0 is no convolution."""
    random = _random(device, seed)
    qkv = random(batch, _tokens(grid), 3 * dim, dtype=dtype)
    if feature == "identity" and normalise:  # keeps the quotient away from 0
        qkv = qkv.detach().abs().requires_grad_()
    return {
        "qkv_BNC": qkv,
        "grid": grid,
        "num_heads": heads,
        "feature": feature,
        "normalise": normalise,
        "weight": random(dim, 1, kernel, kernel, factor=0.2) if kernel else None,
        "bias": random(dim) if kernel else None,
    }


def _cost(default_kernel: int):
    """Forward reads q, k, v and writes o; backward reads those three and the gradient and writes three."""

    def cost(
        itemsize: int,
        *,
        batch: int,
        grid: tuple[int, ...],
        heads: int,
        dim: int,
        kernel: int = default_kernel,
        lepe: bool = False,
        **_,
    ) -> Cost:
        tensor = batch * _tokens(grid) * dim * itemsize
        flops = _count(batch, _tokens(grid), dim, heads, grid[0] * grid[1], max(kernel, 3 if lepe else 0))
        return Cost(4 * tensor, 7 * tensor, flops, 2 * flops)

    return cost


_SWIN = {"batch": 128, "heads": 3, "dim": 96}
_SWIN_2 = {"batch": 128, "heads": 6, "dim": 192}
CHECKS = {
    "7x7": {"batch": 2, "grid": (7, 7), "heads": 2, "dim": 32, "kernel": 3},
    "one token, power 1": {"batch": 1, "grid": (1, 1), "heads": 1, "dim": 16, "power": 1.0, "learned": False},
    "7 tokens, head width 24, no convolution": {"batch": 2, "grid": (1, 7), "heads": 3, "dim": 72, "kernel": 0},
    "9x7, prefix, head width 72, lepe": {
        "batch": 1, "grid": (9, 7, 1), "heads": 2, "dim": 144, "kernel": 3, "lepe": True,
    },
    "5x20, power 4.5, head width 16, lepe": {
        "batch": 1, "grid": (5, 20), "heads": 3, "dim": 48, "power": 4.5, "lepe": True,
    },
    "13 tokens, power 8, no position, lepe alone": {
        "batch": 2, "grid": (13, 1), "heads": 2, "dim": 192, "power": 8.0, "position": False, "kernel": 0, "lepe": True,
    },
    "10x10, head width 64": {"batch": 1, "grid": (10, 10), "heads": 1, "dim": 64, "kernel": 3},
}  # fmt: skip
STAGES = {
    "FLatten-Swin 224 px stage 1": _SWIN | {"grid": (56, 56)},
    "FLatten-Swin 224 px stage 2": _SWIN_2 | {"grid": (28, 28)},
    "FLatten-PVT 224 px stage 1": {"batch": 128, "grid": (56, 56), "heads": 1, "dim": 64},
    "FLatten-PVT 224 px stage 2": {"batch": 128, "grid": (28, 28), "heads": 2, "dim": 128},
    "FLatten-PVT 224 px stage 3": {"batch": 128, "grid": (14, 14), "heads": 5, "dim": 320},
    "FLatten-PVT 224 px stage 4": {"batch": 128, "grid": (7, 7), "heads": 8, "dim": 512},
    "FLatten-CSWin 224 px stage 1": {"batch": 128, "grid": (56, 56), "heads": 2, "dim": 64, "lepe": True},
    "FLatten-Swin 1024 px stage 1": {"batch": 8, "grid": (256, 256), "heads": 3, "dim": 96},
    "FLatten-PVT 1024 px stage 3": {"batch": 8, "grid": (64, 64), "heads": 5, "dim": 320},
    "FLatten-Swin 224 px stage 1, one image": {"batch": 1, "grid": (56, 56), "heads": 3, "dim": 96},
}
INLINE_CHECKS = {
    "7x7": {"batch": 2, "grid": (7, 7), "heads": 2, "dim": 32},
    "one token": {"batch": 1, "grid": (1, 1), "heads": 1, "dim": 16},
    "9x7, prefix, head width 24": {"batch": 2, "grid": (9, 7, 1), "heads": 3, "dim": 72},
    "10x10, head width 48": {"batch": 1, "grid": (10, 10), "heads": 1, "dim": 48},
    "13 tokens, head width 96, no convolution": {"batch": 2, "grid": (13, 1), "heads": 1, "dim": 96, "kernel": 0},
}
INLINE_STAGES = {
    "InLine-Swin 224 px stage 1": _SWIN | {"grid": (56, 56)},
    "InLine-Swin 224 px stage 2": _SWIN_2 | {"grid": (28, 28)},
    "InLine-Swin 224 px stage 3": {"batch": 128, "grid": (14, 14), "heads": 12, "dim": 384},
    "InLine-PVT 224 px stage 4": {"batch": 128, "grid": (7, 7), "heads": 16, "dim": 512},
    "InLine-DeiT-T 224 px": {"batch": 128, "grid": (14, 14, 1), "heads": 6, "dim": 192},
    "InLine-Swin 1024 px stage 1": {"batch": 8, "grid": (256, 256), "heads": 3, "dim": 96},
    "InLine-Swin 224 px stage 1, one image": {"batch": 1, "grid": (56, 56), "heads": 3, "dim": 96},
}
LINEAR_CHECKS = {
    "7x7, relu": {"batch": 2, "grid": (7, 7), "heads": 2, "dim": 32, "kernel": 3},
    "one token, elu": {"batch": 1, "grid": (1, 1), "heads": 1, "dim": 16, "feature": "elu"},
    "10x10, elu, head width 64": {"batch": 1, "grid": (10, 10), "heads": 1, "dim": 64, "feature": "elu", "kernel": 5},
    "9x7, prefix, identity": {"batch": 2, "grid": (9, 7, 1), "heads": 3, "dim": 48, "feature": "identity"},
    "13 tokens, identity, not normalised, head width 96": {
        "batch": 2, "grid": (13, 1), "heads": 2, "dim": 192, "feature": "identity", "normalise": False, "kernel": 3,
    },
}  # fmt: skip
LINEAR_STAGES = {
    "relu 224 px stage 1": _SWIN | {"grid": (56, 56), "kernel": 3},
    "elu 224 px stage 3": {"batch": 128, "grid": (14, 14), "heads": 12, "dim": 384, "feature": "elu"},
    "relu 1024 px stage 1": {"batch": 8, "grid": (256, 256), "heads": 3, "dim": 96, "kernel": 3},
}


def _official_focused(
    qkv_BNC: Tensor, grid: tuple[int, ...], num_heads: int, *, power: float, scale_C: Tensor, position_NC, weight, bias,
    lepe_weight, lepe_bias,
) -> Tensor:  # fmt: skip
    """As the authors' code does it: features in the activations' dtype, heads copied apart, maps channels first."""
    dtype, (B, N, _) = qkv_BNC.dtype, qkv_BNC.shape
    q, k, v = qkv_BNC.chunk(3, -1)
    k = k if position_NC is None else k + position_NC.to(dtype)
    q, k = ((F.relu(x) + EPS) / scale_C.to(dtype) for x in (q, k))
    lengths = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
    q, k = q**power, k**power
    q, k = (x / x.norm(dim=-1, keepdim=True) * length for x, length in zip((q, k), lengths, strict=True))
    q, k, v = (_heads(x, num_heads).contiguous() for x in (q, k, v))
    z = 1 / (q @ k.mean(2, keepdim=True).mT + EPS)
    o_BNC = _merged(q @ ((k.mT * N**-0.5) @ (v * N**-0.5)) * z)
    height, width, prefix = (*grid, 0)[:3]
    if weight is not None:
        v_map = v[:, :, prefix:].mT.reshape(B * num_heads, -1, height, width)
        local = F.conv2d(v_map, weight.to(dtype), bias.to(dtype), padding=weight.shape[-1] // 2, groups=len(weight))
        o_BNC = o_BNC + F.pad(local.reshape(B, -1, height * width).mT, (0, 0, prefix, 0))
    return _with_convolution(o_BNC, qkv_BNC, grid, lepe_weight, lepe_bias)


def _official_inline(qkv_BNC: Tensor, grid: tuple[int, ...], num_heads: int, *, dynamic_weight_BC33) -> Tensor:
    """As the authors' code does it: `q kv + (1 - q·mean k) mean v`, and B·C groups of a contiguous map."""
    B, N, C = qkv_BNC.shape[0], qkv_BNC.shape[1], qkv_BNC.shape[2] // 3
    height, width, prefix = (*grid, 0)[:3]
    q, k, v = (_heads(x, num_heads) for x in qkv_BNC.chunk(3, -1))
    scale = q.shape[3] ** -0.5
    state = (k.mT * (scale / N) ** 0.5) @ (v * (scale / N) ** 0.5)
    rest = 1 - q @ k.mean(2, keepdim=True).mT * scale
    o_BNC = _merged(q @ state + rest * v.mean(2, keepdim=True))
    if dynamic_weight_BC33 is None:
        return o_BNC
    v_map = v.transpose(1, 2).reshape(B, N, C)[:, prefix:].mT.reshape(1, B * C, height, width)
    local = F.conv2d(v_map, dynamic_weight_BC33.to(v.dtype).view(-1, 1, 3, 3), padding=1, groups=B * C)
    return o_BNC + F.pad(local.view(B, C, -1).mT, (0, 0, prefix, 0))


def _sdpa(qkv_BNC: Tensor, grid: tuple[int, ...], num_heads: int, **_) -> Tensor:
    return _merged(F.scaled_dot_product_attention(*(_heads(x, num_heads) for x in qkv_BNC.chunk(3, -1))))


OPERATION = Operation(
    name=FOCUSED,
    run=focused_linear_attention,
    reference=focused_reference,
    inputs=focused_inputs,
    checks=CHECKS,
    stages=STAGES,
    cost=_cost(5),
    baselines={"official": _official_focused, "pytorch": focused_reference, "sdpa": _sdpa},
)
INLINE = Operation(
    name=INLINE_WHO,
    run=inline_attention,
    reference=inline_reference,
    inputs=inline_inputs,
    checks=INLINE_CHECKS,
    stages=INLINE_STAGES,
    cost=_cost(3),
    baselines={"official": _official_inline, "pytorch": inline_reference, "sdpa": _sdpa},
)
LINEAR = Operation(
    name=WHO,
    run=linear_attention,
    reference=linear_reference,
    inputs=linear_inputs,
    checks=LINEAR_CHECKS,
    stages=LINEAR_STAGES,
    cost=_cost(0),
    baselines={"pytorch": linear_reference, "sdpa": _sdpa},
)
OPERATIONS = (OPERATION, INLINE, LINEAR)
