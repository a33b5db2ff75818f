"""Class attention: a class token that joins behind the last block on the map, and alone asks for what it needs there.

Source: Going deeper with Image Transformers (CaiT), Touvron et al., ICCV 2021, arXiv:2103.17239, section 3; in the form
of XCiT, El-Nouby et al., NeurIPS 2021, arXiv:2106.09681, whose code is followed where it does more than the paper says:
what a block adds to the tokens of the map are these themselves, first normalised and scaled, then as they are. The next
block reads them as keys.
Shapes: B = batch, N = 1 + H·W tokens, C = channels, M = heads, D = channels per head.
"""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from conf.errors import UserError
from kernels.heads import merge_heads, split_heads
from models.layers.block import scale


class ClassToken(nn.Module):
    """A learned token in front of the map: `(x_BNC, grid) -> (x_BNC, grid)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, tuple]:
        return torch.cat([self.class_token.expand(x_BNC.shape[0], -1, -1), x_BNC], dim=1), grid._replace(prefix=1)


class ClassAttention(nn.Module):
    """`softmax(q kᵀ / √D) v` for the first token alone, (B, N, C) → (B, 1, C), or for others that ask: (B, Q, C).

    Args:
        dim, num_heads: channels C and heads M.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(
                f"ClassAttention: {dim} channels are no whole heads, got num_heads={num_heads}; set model.num_heads"
            )
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor, asking_BQC: Tensor | None = None) -> Tensor:
        dim, (weight, bias) = x_BNC.shape[-1], (self.qkv.weight, self.qkv.bias)
        asking = x_BNC[:, :1] if asking_BQC is None else asking_BQC
        (q_BMND,) = split_heads(F.linear(asking, weight[:dim], bias[:dim]), 1, self.num_heads)
        k_BMND, v_BMND = split_heads(F.linear(x_BNC, weight[dim:], bias[dim:]), 2, self.num_heads)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q_BMND, k_BMND, v_BMND)))


class ClassBlock(nn.Module):
    """Class attention, then an MLP of the class token, as a block of a stage: `(x_BNC, grid) -> (x_BNC, {})`.

        y = norm₁(x),   x ← x + γ₁ [attention(y), y on the map],   x ← norm₂(x),   x ← x + [γ₂ mlp(class), x on the map]

    Args:
        dim, num_heads: channels C and heads.
        mlp_ratio: hidden channels of the MLP over C.
        layer_scale: initial value of γ; None for no scale.
        norm_eps: of both LayerNorms.
        tokens_norm: norm₂ on all tokens, or on the class token alone.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        tokens_norm: bool = True,
    ) -> None:
        super().__init__()
        self.tokens_norm = tokens_norm
        self.norm1, self.attn = nn.LayerNorm(dim, eps=norm_eps), ClassAttention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=norm_eps), Mlp(dim, int(dim * mlp_ratio))
        self.scale1, self.scale2 = scale(dim, layer_scale), scale(dim, layer_scale)

    def forward(self, x_BNC: Tensor, grid: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.norm1(x_BNC)
        x = x_BNC + self.scale1(torch.cat([self.attn(y), y[:, 1:]], dim=1))
        x = self.norm2(x) if self.tokens_norm else torch.cat([self.norm2(x[:, :1]), x[:, 1:]], dim=1)
        first, on_map = x[:, :1], x[:, 1:]
        return torch.cat([first + self.scale2(self.mlp(first)), 2 * on_map], dim=1), {}
