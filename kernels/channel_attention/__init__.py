"""Channel attention: the D channels of each head attend to one another, with logits summed over all tokens.

    A = softmax((k s)ᵀ v),  o = q Aᵀ,  s = D^-1/2

for every image and head; q, k, v are (N, D) and A is D×D, normalised over the channels of v. The sum over tokens is
accumulated in float32. Nothing grows with N², and forward moves q, k, v and o once.

Source: DaViT, Ding et al., ECCV 2022, arXiv:2204.03645, section 3.3 (channel group attention). Their code's q, k, v are
the paper's values, queries and keys; the names here are those of the code.
"""

import torch
from torch import Tensor

from kernels.channel_attention.register import attend
from kernels.dispatch import autocast, check_head_dim, check_tensors, is_fused

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
        return reference(qkv_BNC, num_heads, scale=scale)
    (qkv_BNC,) = autocast(qkv_BNC)
    check_tensors(WHO, {"qkv": qkv_BNC})
    check_head_dim(WHO, head_dim)
    return attend(qkv_BNC, num_heads, scale)


def reference(qkv_BNC: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """The definition in plain PyTorch."""
    q, k, v = qkv_BNC.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with _full_precision(qkv_BNC):
        weights_BMDD = ((_wide(k) * scale).mT @ _wide(v)).softmax(-1)
    return (q @ weights_BMDD.to(q.dtype).mT).transpose(1, 2).flatten(2)


def _full_precision(x: Tensor):
    """Autocast off inside."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
