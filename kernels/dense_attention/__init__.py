"""Dense attention with weights other than the softmax: sigmoid ones, and clipped ones.

    o = w(scale · q kᵀ) v      over all N tokens
    sigmoid:  w = σ(s factor + bias)
    clipped:  w = clip((ζ - γ) softmax(s) + γ, 0, 1)

Source: sigmoid: Theory, Analysis, and Best Practices for Sigmoid Self-Attention, Ramapuram et al., ICLR 2025,
arXiv:2409.04431, equation 3. Clipped: Quantizable Transformers: Removing Outliers by Helping Attention Heads Do
Nothing, Bondarenko et al., NeurIPS 2023, arXiv:2306.12929, equation 4.
Shapes: B = batch, N = queries, S = keys, C = M·D channels, M = heads, D = channels per head.
What is clipped has no gradient. In half precision the definition rounds the logits, the fused path does not.
"""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from kernels.dense_attention.register import attend_clipped, attend_sigmoid
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.heads import merge_heads, split_heads
from kernels.precision import wide

SIGMOID, CLIPPED = "sigmoid_attention", "clipped_attention"


def sigmoid_attention(
    qkv_BNC: Tensor,
    num_heads: int,
    *,
    bias: float | Tensor = 0.0,
    factor: float = 1.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with sigmoid weights, (B, N, M·D) in the dtype of qkv.

    Args:
        qkv_BNC: (B, N, 3·M·D) queries, keys, values of `nn.Linear`, each M heads of D channels. May be strided.
        num_heads: M.
        bias: added to the logits: a number, or one per head, (M, 1, 1).
        factor: of the logits, above 0.
        scale: of the logits as well, above 0; None for D^-1/2.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, numbers that are none, or heads of more than 128
            channels on the fused path.
    """
    _check(SIGMOID, qkv_BNC, num_heads, scale)
    if not 0 < factor < math.inf:
        raise ValueError(f"{SIGMOID}: factor must be a number above 0, got {factor}; 1 leaves the logits as they are")
    learned = isinstance(bias, Tensor)
    if learned and (tuple(bias.shape) != (num_heads, 1, 1) or not bias.is_floating_point()):
        raise ValueError(
            f"{SIGMOID}: bias must be a number or {(num_heads, 1, 1)} and floating, got {tuple(bias.shape)} "
            f"{str(bias.dtype).removeprefix('torch.')}; give one per head"
        )
    if not is_fused(SIGMOID, backend, qkv_BNC):
        return _defined(qkv_BNC, num_heads, partial(sigmoid_weights, bias=bias, factor=factor), scale)
    (qkv_BNC,) = autocast(qkv_BNC)
    scale = _scale(SIGMOID, qkv_BNC, num_heads, scale, bias if learned else None)
    return attend_sigmoid(
        qkv_BNC, bias if learned else None, num_heads, scale * factor, 0.0 if learned else float(bias)
    )


def clipped_attention(
    qkv_BNC: Tensor,
    num_heads: int,
    *,
    gamma: float,
    zeta: float = 1.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with clipped softmax weights, (B, N, M·D) in the dtype of qkv.

    Args:
        qkv_BNC, num_heads, scale, backend: see `sigmoid_attention`.
        gamma: γ, at most 0.
        zeta: ζ, at least 1.

    Raises:
        ValueError: as `sigmoid_attention`.
    """
    _check(CLIPPED, qkv_BNC, num_heads, scale)
    if not -math.inf < gamma <= 0:
        raise ValueError(f"{CLIPPED}: gamma must be a number of at most 0, got {gamma}; 0 clips no small weight")
    if not 1 <= zeta < math.inf:
        raise ValueError(f"{CLIPPED}: zeta must be a number of at least 1, got {zeta}; 1 clips no large weight")
    if not is_fused(CLIPPED, backend, qkv_BNC):
        return _defined(qkv_BNC, num_heads, partial(clipped_weights, gamma=gamma, zeta=zeta), scale)
    (qkv_BNC,) = autocast(qkv_BNC)
    return attend_clipped(
        qkv_BNC, num_heads, _scale(CLIPPED, qkv_BNC, num_heads, scale, None), float(gamma), float(zeta)
    )


def definition(
    q_BMND: Tensor,
    k_BMSD: Tensor,
    v_BMSD: Tensor,
    weigh: Callable[[Tensor, Tensor | None], Tensor],
    *,
    scale: float | None = None,
) -> Tensor:
    """`w(scale · q kᵀ) v` of heads, (B, M, N, D), with the weights written out; `weigh` is one of the two below."""
    scale = q_BMND.shape[-1] ** -0.5 if scale is None else scale
    return weigh(q_BMND @ k_BMSD.mT * scale, None).to(v_BMSD.dtype) @ v_BMSD


def sigmoid_weights(
    logits_BMNS: Tensor, open: Tensor | None = None, *, bias: float | Tensor = 0.0, factor: float = 1.0
) -> Tensor:
    """σ(s factor + bias), in float32 at least; 0 where `open` is False."""
    weights = (wide(logits_BMNS) * factor + bias).sigmoid()
    return weights if open is None else weights.masked_fill(~open, 0.0)


def clipped_weights(logits_BMNS: Tensor, open: Tensor | None = None, *, gamma: float, zeta: float = 1.0) -> Tensor:
    """clip((ζ - γ) softmax(s) + γ, 0, 1), of the pairs that are open alone; 0 where `open` is False."""
    if open is not None:
        logits_BMNS = logits_BMNS.masked_fill(~open, -math.inf)
    weights = ((zeta - gamma) * logits_BMNS.softmax(-1) + gamma).clamp(0, 1)
    return weights if open is None else weights.masked_fill(~open, 0.0)


def _defined(qkv_BNC: Tensor, num_heads: int, weigh: Callable, scale: float | None) -> Tensor:
    return merge_heads(definition(*split_heads(qkv_BNC, 3, num_heads), weigh, scale=scale)).to(qkv_BNC.dtype)


def _scale(who: str, qkv: Tensor, num_heads: int, scale: float | None, bias: Tensor | None) -> float:
    """The scale of the logits, of what the kernels take."""
    check_tensors(who, {"qkv": qkv}, {"bias": bias})
    head_dim = qkv.shape[2] // (3 * num_heads)
    check_head_dim(who, head_dim)
    return head_dim**-0.5 if scale is None else float(scale)


def _check(who: str, qkv: Tensor, num_heads: int, scale: float | None) -> None:
    if scale is not None and not scale > 0:
        raise ValueError(f"{who}: scale must be above 0, got {scale}; use None for D^-1/2")
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads) or not qkv.shape[2]:
        raise ValueError(
            f"{who}: qkv must be (B, N, 3·{num_heads}·D), got {tuple(qkv.shape)}; pass the output of the projection"
        )
