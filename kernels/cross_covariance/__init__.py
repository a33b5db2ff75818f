"""Cross-covariance attention: the D channels of each head attend to one another by the cosine of queries and keys.

    A = softmax(q̂ᵀ k̂ τ),  o = v Aᵀ,  q̂ = q / max(‖q‖, ε),  k̂ = k / max(‖k‖, ε),  one τ per head

for every image and head; q, k, v are (N, D), lengths ‖·‖ are those of a channel over all tokens, and A is D×D,
normalised over the channels of k. Sums over tokens are accumulated in float32. Nothing grows with N², and forward moves
q, k, v and o once.

Source: XCiT, El-Nouby et al., NeurIPS 2021, arXiv:2106.09681, section 3.2. Their code has ε = 1e-12, with which the
gradient at a channel of zeros reaches 1e12; ours is far below the length of any channel in use.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.cross_covariance.register import EPSILON, attend
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.heads import merge_heads, split_heads
from kernels.precision import full_precision, wide

WHO = "cross_covariance"


def cross_covariance(qkv_BNC: Tensor, temperature_M: Tensor, num_heads: int, *, backend: str = "auto") -> Tensor:
    """`v softmax(q̂ᵀ k̂ τ)ᵀ` per head, (B, N, C) in the dtype of qkv.

    Args:
        qkv_BNC: a packed projection (B, N, 3C): q, k and v, each of num_heads × D channels. It may be strided.
        temperature_M: τ of every head.
        num_heads: number of heads M.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a projection that does not divide into heads, another number of temperatures, or more than 128
            channels per head on the fused path.
    """
    if num_heads < 1 or qkv_BNC.dim() != 3 or qkv_BNC.shape[2] % (3 * num_heads):
        raise ValueError(
            f"{WHO}: qkv must be (B, N, 3 * {num_heads} heads * D), got {tuple(qkv_BNC.shape)}; pass the output of "
            "nn.Linear(C, 3 * C) and a number of heads that divides C"
        )
    if tuple(temperature_M.shape) != (num_heads,):
        raise ValueError(
            f"{WHO}: temperature must be ({num_heads},), got {tuple(temperature_M.shape)}; give one number per head"
        )
    if not is_fused(WHO, backend, qkv_BNC):
        return merge_heads(definition(*split_heads(qkv_BNC, 3, num_heads), temperature_M))
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC}, {"temperature": temperature_M})
    check_head_dim(WHO, qkv_BNC.shape[2] // (3 * num_heads))
    return attend(qkv_BNC, temperature_M, num_heads)


def definition(q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, temperature_M: Tensor) -> Tensor:
    """`v softmax(q̂ᵀ k̂ τ)ᵀ` of heads, (B, M, N, D); weights in float32 at least."""
    with full_precision(q_BMND.device):
        q, k = (F.normalize(wide(x), dim=2, eps=EPSILON) for x in (q_BMND, k_BMND))
        weights_BMDD = (q.mT @ k * temperature_M[:, None, None]).softmax(-1)
    return v_BMND @ weights_BMDD.to(v_BMND.dtype).mT
