"""Channel attention: the D channels of each head attend to one another, with logits summed over all tokens.

    A = softmax((k s)ᵀ v),  o = q Aᵀ,  s = D^-1/2

for every image and head; q, k, v are (N, D) and A is D×D, normalised over the channels of v. The sum over tokens is
accumulated in float32. Nothing grows with N², and forward moves q, k, v and o once.

`channel_attention_folded` computes the same from the input of the projection without forming q, k, v. With G = xᵀ x
and t = Σ x over the tokens of an image, and per head
    kᵀ v = W_k G W_vᵀ + (W_k t) b_vᵀ + b_k (W_v t)ᵀ + N b_k b_vᵀ,   o = x (A W_q)ᵀ + A b_q,
so that x is read twice and the result written once. Its C×C algebra costs about 4 C³ per image: it pays from N ≈ 3 C.

Source: DaViT, Ding et al., ECCV 2022, arXiv:2204.03645, section 3.3 (channel group attention). Their code's q, k, v are
the paper's values, queries and keys; the names here are those of the code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.channel_attention.register import ChannelAttention, Gram, full_precision
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused

WHO = "channel_attention"
FOLDED_WHO = "channel_attention_folded"


def channel_attention(qkv_BNC: Tensor, num_heads: int, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """`q softmax((k scale)ᵀ v)ᵀ` per head, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC: a packed projection (B, N, 3C): q, k and v, each of num_heads × D channels. It may be strided.
        num_heads: number of heads (channel groups) M.
        scale: of the logits, D^-1/2 by default.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a projection that does not divide into heads, or more than 128 channels per head on the fused path.
    """
    if num_heads < 1 or qkv_BNC.dim() != 3 or qkv_BNC.shape[2] % (3 * num_heads):
        raise ValueError(
            f"{WHO}: qkv must be (B, N, 3 * {num_heads} heads * D), got {tuple(qkv_BNC.shape)}; pass the output of "
            "nn.Linear(C, 3 * C) and a number of heads that divides C"
        )
    head_dim = qkv_BNC.shape[2] // (3 * num_heads)
    scale = head_dim**-0.5 if scale is None else scale
    if not is_fused(WHO, backend, qkv_BNC):
        return reference(qkv_BNC, num_heads, scale=scale)
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC})
    check_head_dim(WHO, head_dim)
    return ChannelAttention.apply(qkv_BNC, num_heads, scale)


def reference(qkv_BNC: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """The definition in plain PyTorch."""
    q, k, v = qkv_BNC.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(qkv_BNC):
        weights_BMDD = ((_wide(k) * scale).mT @ _wide(v)).softmax(-1)
    return (q @ weights_BMDD.to(q.dtype).mT).transpose(1, 2).flatten(2)


def channel_attention_folded(
    x_BNC: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Projection, channel attention and, if given, output projection of x, (B, N, C) in the dtype of x.

    Args:
        x_BNC: tokens.
        qkv_weight: (3C, C) as in `nn.Linear(C, 3 * C)`.
        qkv_bias: (3C,), or None.
        num_heads: number of heads M.
        scale: of the logits, D^-1/2 by default.
        proj_weight: (C, C) of a projection applied to the result, or None.
        proj_bias: (C,) of that projection, or None.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes that do not fit together, or a bias of a projection that is not there.
    """
    _check_folded(x_BNC, qkv_weight, qkv_bias, num_heads, proj_weight, proj_bias)
    parameters = {"qkv_weight": qkv_weight, "qkv_bias": qkv_bias, "proj_weight": proj_weight, "proj_bias": proj_bias}
    if not is_fused(FOLDED_WHO, backend, x_BNC):
        return folded_reference(x_BNC, num_heads=num_heads, scale=scale, **parameters)
    (x_BNC,) = autocast(x_BNC)
    check_tensors(FOLDED_WHO, {"x": x_BNC}, parameters)
    with full_precision(x_BNC):
        gram_BCC, total_BC = Gram.apply(x_BNC)
        weight_BCC, bias_BC = _fold(gram_BCC, total_BC, x_BNC.shape[1], num_heads, scale, qkv_weight, qkv_bias)
        if proj_weight is not None:
            weight_BCC, bias_BC = proj_weight.float() @ weight_BCC, bias_BC @ proj_weight.float().mT
        if proj_bias is not None:
            bias_BC = bias_BC + proj_bias.float()
        return torch.baddbmm(bias_BC.to(x_BNC.dtype).unsqueeze(1), x_BNC, weight_BCC.to(x_BNC.dtype).mT)


def folded_reference(
    x_BNC: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
) -> Tensor:
    """The definition in plain PyTorch: projection, attention, projection."""
    qkv_weight, qkv_bias, proj_weight, proj_bias = (
        p if p is None else p.to(x_BNC.dtype) for p in (qkv_weight, qkv_bias, proj_weight, proj_bias)
    )
    o_BNC = reference(F.linear(x_BNC, qkv_weight, qkv_bias), num_heads, scale=scale)
    return o_BNC if proj_weight is None else F.linear(o_BNC, proj_weight, proj_bias)


def _fold(
    gram_BCC: Tensor,
    total_BC: Tensor,
    tokens: int,
    num_heads: int,
    scale: float | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weight (B, C, C) and bias (B, C) that make the attention a linear map of the tokens of an image, in float32."""
    wq_MDC, wk_MDC, wv_MDC = weight.float().unflatten(0, (3, num_heads, -1)).unbind()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    bq_MD, bk_MD, bv_MD = bias.float().unflatten(0, (3, num_heads, -1)).unbind()
    k_BMDC = (wk_MDC.flatten(0, 1) @ gram_BCC).unflatten(1, wk_MDC.shape[:2])
    # (W_k t + N b_k) b_vᵀ + b_k (W_v t)ᵀ
    left_BMD = (total_BC @ wk_MDC.flatten(0, 1).mT).unflatten(1, bk_MD.shape) + tokens * bk_MD
    right_BMD = (total_BC @ wv_MDC.flatten(0, 1).mT).unflatten(1, bv_MD.shape)
    products = k_BMDC @ wv_MDC.mT + left_BMD.unsqueeze(-1) * bv_MD.unsqueeze(-2)
    products = products + bk_MD.unsqueeze(-1) * right_BMD.unsqueeze(-2)
    scale = wq_MDC.shape[1] ** -0.5 if scale is None else scale
    weights_BMDD = (products * scale).softmax(-1)
    return (weights_BMDD @ wq_MDC).flatten(1, 2), (weights_BMDD @ bq_MD.unsqueeze(-1)).flatten(1)


def _check_folded(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    num_heads: int,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
) -> None:
    if num_heads < 1 or x.dim() != 3 or x.shape[2] % num_heads:
        raise ValueError(
            f"{FOLDED_WHO}: x must be (B, N, {num_heads} heads * D), got {tuple(x.shape)}; choose heads that divide C"
        )
    C = x.shape[2]
    expected = {
        "qkv_weight": (qkv_weight, (3 * C, C)),
        "qkv_bias": (qkv_bias, (3 * C,)),
        "proj_weight": (proj_weight, (C, C)),
        "proj_bias": (proj_bias, (C,)),
    }
    for name, (parameter, shape) in expected.items():
        if parameter is not None and tuple(parameter.shape) != shape:
            raise ValueError(
                f"{FOLDED_WHO}: {name} must be {shape}, got {tuple(parameter.shape)}; pass those of nn.Linear"
            )
    if proj_bias is not None and proj_weight is None:
        raise ValueError(f"{FOLDED_WHO}: proj_bias needs proj_weight, got None; pass both or neither")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
