"""Attention-based aggregation: a learned query, or one per class, attends to the tokens once; then an MLP.

c ← c + γ₁ · proj(softmax(q(u_c) k(u)ᵀ / √D) v(u)) with u = LN([c, x]), then c ← c + γ₂ · MLP(LN(c)), then a norm.

Source: Touvron et al., Augmenting Convolutional networks with attention-based aggregation, 2021, arXiv:2112.13692. As
in the authors' code the keys of the single query include itself, those of the queries of classes are the tokens alone,
and every class has a classifier of its own query. What stands in front of the map in other backbones is among the keys.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, Q = queries, M = heads, D = C / M, K = classes.
"""

from typing import Any

import torch
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.layers.grid import Grid
from models.layers.pooled import Pool, Pooled

WHO = "AttentionAggregation"


class AttentionAggregation(Pool):
    """(B, N, C) → (B, C), or (B, K, C) from a query per class.

    Its `weights` are the mean over heads; what the single query takes of itself is left out of them.

    Args:
        dim: channels C.
        grid: of the place; it does not depend on it.
        num_classes: K.
        queries: 1, or "classes" for one per class.
        num_heads: M.
        mlp_ratio: hidden over outer channels of the MLP.
        layer_scale: initial value of γ₁ and γ₂.
        qkv_bias: whether q, k and v have a bias.

    Raises:
        ValueError: an option out of range, heads that do not divide the channels, or queries of no classes.
    """

    undecayed = ("queries", "class_queries")
    normalizes = True

    def __init__(
        self,
        dim: int,
        grid: Grid,
        num_classes: int,
        *,
        queries: int | str = 1,
        num_heads: int = 1,
        mlp_ratio: float = 3.0,
        layer_scale: float = 1e-4,
        qkv_bias: bool = True,
    ) -> None:
        _check(queries, num_heads, mlp_ratio, layer_scale, qkv_bias, dim, num_classes)
        super().__init__(dim)
        self.per_class = queries == "classes"
        self.queries = None if self.per_class else nn.Parameter(torch.empty(1, 1, dim))
        self.class_queries = nn.Parameter(torch.empty(num_classes, dim)) if self.per_class else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = QueryAttention(dim, num_heads, qkv_bias)
        self.scale1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.scale2 = LayerScale(dim, layer_scale)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.class_queries if self.per_class else self.queries, std=0.02)
        for layer in (*self.attn.children(), self.mlp.fc1, self.mlp.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Earlier checkpoints have the queries of classes as `queries`, (1, K, C)."""
        if self.per_class and f"{prefix}queries" in state:
            state[f"{prefix}class_queries"] = state.pop(f"{prefix}queries")[0]
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Pooled:
        queries = self.class_queries[None] if self.per_class else self.queries
        c_BQC, weights_BQN = self.attended(queries.expand(x_BNC.shape[0], -1, -1), x_BNC)
        c_BQC = self.norm(c_BQC)
        return Pooled(c_BQC if self.per_class else c_BQC.squeeze(1), weights_BQN, {})

    def attended(self, c_BQC: Tensor, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """The block of the queries, and their weights on the tokens."""
        first = c_BQC.shape[1]
        u = self.norm1(torch.cat([c_BQC, x_BNC], dim=1))
        mixed, weights = self.attn(u[:, :first], u[:, first:] if self.per_class else u)
        c_BQC = c_BQC + self.scale1(mixed)
        return c_BQC + self.scale2(self.mlp(self.norm2(c_BQC))), weights[..., -x_BNC.shape[1] :]

    def own_head(self, num_classes: int) -> nn.Module | None:
        return PerClass(self.out_dim, num_classes) if self.per_class else None


class QueryAttention(nn.Module):
    """Queries (B, Q, C) attend to tokens (B, S, C): (B, Q, C), and the weights (B, Q, S), the mean over heads."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, c_BQC: Tensor, u_BSC: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, c_BQC), (self.k, u_BSC), (self.v, u_BSC))
        )
        weights_BMQS = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights_BMQS @ v).transpose(1, 2).flatten(2)), weights_BMQS.mean(1)


class PerClass(nn.Module):
    """A linear classifier for each class of its own features: (B, K, C) → (B, K)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(num_classes, dim)), nn.Parameter(torch.zeros(num_classes))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x_BKC: Tensor) -> Tensor:
        return (x_BKC * self.weight).sum(-1) + self.bias


def _check(
    queries: int | str,
    num_heads: int,
    mlp_ratio: float,
    layer_scale: float,
    qkv_bias: bool,
    dim: int,
    num_classes: int,
) -> None:
    if queries != "classes" and (queries != 1 or not values.is_whole(queries)):
        values.refuse(WHO, "queries", "1 or classes", queries, "set pool.queries")
    values.whole(WHO, "num_heads", num_heads, fix="set pool.num_heads")
    if not (values.is_number(mlp_ratio, 0) and mlp_ratio > 0):
        values.refuse(WHO, "mlp_ratio", "a number above 0", mlp_ratio, "set pool.mlp_ratio")
    values.number(WHO, "layer_scale", layer_scale, fix="set pool.layer_scale")
    values.flag(WHO, "qkv_bias", qkv_bias, fix="set pool.qkv_bias=true or false")
    if dim % num_heads:
        raise UserError(f"{WHO}: {dim} channels must divide into heads, got {num_heads}; set pool.num_heads")
    if queries == "classes" and not num_classes:
        raise UserError(f"{WHO}: a query per class needs classes, got num_classes=0; set pool.queries=1")
