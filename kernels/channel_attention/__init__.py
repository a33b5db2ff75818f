"""Channel attention: the D channels of each head attend to one another, with logits summed over all tokens.

    A = softmax((k s)ᵀ v),  o = q Aᵀ,  s = D^-1/2

for every image and head; q, k, v are (N, D) and A is D×D, normalised over the channels of v. The sum over tokens is
accumulated in float32. Nothing grows with N², and forward moves q, k, v and o once.

Source: DaViT, Ding et al., ECCV 2022, arXiv:2204.03645, section 3.3 (channel group attention). Their code's q, k, v are
the paper's values, queries and keys; the names here are those of the code.
"""

from torch import Tensor

from kernels.channel_attention.register import attend
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused
from kernels.heads import merge_heads, split_heads
from kernels.precision import full_precision, wide

WHO = "channel_attention"


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
        return merge_heads(definition(*split_heads(qkv_BNC, 3, num_heads), scale))
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC})
    check_head_dim(WHO, head_dim)
    return attend(qkv_BNC, num_heads, scale)


def definition(q_BMND: Tensor, k_BMND: Tensor, v_BMND: Tensor, scale: float) -> Tensor:
    """`q softmax((k scale)ᵀ v)ᵀ` of heads, (B, M, N, D)."""
    return q_BMND @ channel_weights(k_BMND, v_BMND, scale).to(q_BMND.dtype).mT


def channel_weights(k_BMND: Tensor, v_BMND: Tensor, scale: float) -> Tensor:
    """Weights (B, M, D, D) of every channel on every channel, in float32 at least.

    Sums over thousands of tokens leave the range of float16.
    """
    with full_precision(k_BMND.device):
        return ((wide(k_BMND) * scale).mT @ wide(v_BMND)).softmax(-1)
