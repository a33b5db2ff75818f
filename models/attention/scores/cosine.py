"""Length-scaled cosine scores: the angle of query and key, with a learned temperature that follows the number of keys.

Source: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, equations 5 and 6: s = τ log(S) (q/‖q‖ + e) (k/‖k‖)ᵀ.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head.
τ = softplus(temperature) starts at 1 / 0.24; e, the query embedding, is one vector per head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.contract import Site
from models.attention.contract.heads import head_channels

# Far below the norm of any query in use. The authors' 1e-12 lets the gradient at an all-zero token reach 1e12.
EPSILON = 1e-6


def cosine(site: Site) -> "CosineScore":
    """Cosines, in float32.

    Args:
        site: the place in the backbone.
    """
    return CosineScore(site.num_heads, head_channels(site))


class LengthScaled(nn.Module):
    """Queries and keys whose products are the scores; mixed into what owns the temperature and the embedding."""

    def learn_scale(self, num_heads: int, head_dim: int) -> None:
        """Makes the parameters."""
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def scaled(self, q_BMND: Tensor, k_BMSD: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled queries and unit keys, in float32."""
        q, k = (F.normalize(t.float(), dim=-1, eps=EPSILON) for t in (q_BMND, k_BMSD))
        scale = F.softplus(self.temperature.float()) * math.log(k.shape[2])
        return (q + self.query_embedding.float()) * scale, k


class CosineScore(LengthScaled):
    """Logits (B, M, N, S)."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.learn_scale(num_heads, head_dim)

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor) -> Tensor:
        q, k = self.scaled(q_BMND, k_BMSD)
        return q @ k.mT
