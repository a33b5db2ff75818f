"""A block in which tokens ask other tokens, of another width, for what they hold.

Source: the cross-attention of Perceiver, Jaegle et al., ICML 2021, arXiv:2103.03206, section 3.2, and of FIT, Chen &
Li, 2023, arXiv:2305.12689, section 2.
Shapes: B = batch, N = tokens that ask, S = tokens that are asked, C = channels, M = heads, D = channels per head.
"""

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from kernels.heads import merge_heads, split_heads
from models.layers.block import scale


class CrossAttention(nn.Module):
    """`softmax(q kᵀ / √D) v`, queries of one kind of tokens, keys and values of the other: (B, N, C), (B, S, C').

    Args:
        dim, source_dim: channels of those that ask and of those that are asked.
        num_heads, head_dim: heads M and their channels D.
        qkv_bias: bias of queries, keys and values.
    """

    def __init__(self, dim: int, source_dim: int, num_heads: int, head_dim: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_dim
        self.q = nn.Linear(dim, inner, bias=qkv_bias)
        self.kv = nn.Linear(source_dim, 2 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x_BNC: Tensor, source_BSC: Tensor) -> Tensor:
        (q_BMND,) = split_heads(self.q(x_BNC), 1, self.num_heads)
        k_BMSD, v_BMSD = split_heads(self.kv(source_BSC), 2, self.num_heads)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q_BMND, k_BMSD, v_BMSD)))


class CrossBlock(nn.Module):
    """x + attend(norm₁(x), norm(source)), then x + mlp(norm₂(x)), with drop path and layer scale on both branches.

    Called as `block(x_BNC, source_BSC) -> x_BNC`. Its parts are named as those of `models.layers.block.Block`.

    Args:
        attn: the attention.
        mlp: or None.
        drop_path: see `Block`; None for none.
        layer_scale, norm_eps: see `Block`.
    """

    def __init__(
        self,
        attn: CrossAttention,
        mlp: nn.Module | None = None,
        *,
        drop_path: float | None = None,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim, source_dim = attn.q.in_features, attn.kv.in_features
        self.norm1, self.norm_source = nn.LayerNorm(dim, eps=norm_eps), nn.LayerNorm(source_dim, eps=norm_eps)
        self.attn, self.scale1 = attn, scale(dim, layer_scale)
        self.mlp = mlp
        if mlp is not None:
            self.norm2, self.scale2 = nn.LayerNorm(dim, eps=norm_eps), scale(dim, layer_scale)
        self.drop_path = nn.Identity() if drop_path is None else DropPath(drop_path)

    def forward(self, x_BNC: Tensor, source_BSC: Tensor) -> Tensor:
        asked = self.attn(self.norm1(x_BNC), self.norm_source(source_BSC))
        x = x_BNC + self.drop_path(self.scale1(asked))
        return x if self.mlp is None else x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
