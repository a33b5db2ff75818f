"""Aggregated attention: every token attends to its neighbours and to a pooled map in one softmax, by cosine similarity.

Source: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, sections 3.1 to 3.3. With q̂ and k̂ of length 1, the T cells of a
window around token i (those inside the map count), P pooled tokens, and n the number of both,
    s = τ log(n) (q̂ + e);   a = softmax([s k̂_windowᵀ + b, s k̂_poolᵀ + bias(Δy, Δx)]);
    o = (a_window + q̂ t + c) v_window + a_pool v_pool,   pooled tokens = LN(pool(GELU(x W + d))),
where both kinds of keys and values come from one projection, and t and c, learned tokens and their bias, act outside of
the softmax. The heads are `kernels.aggregated_attention`. The authors' code copies keys and values T-fold (unfold).

Shapes: B = batch, N = H·W tokens, P = pooled tokens, C = channels, M = heads, D = channels per head, T = window².
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.aggregated_attention import aggregated_attention as aggregated_heads
from kernels.aggregated_attention.constants import EPSILON
from kernels.dispatch import WIDEST_HEAD
from kernels.precision import full_precision, wide
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site, TokenWeights
from models.attention.contract.explaining import grafted, is_explaining
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_flags, check_odd, check_whole, for_stage
from models.attention.cosine import ContinuousPositionBias, cosine_attention, measured_in
from models.layers.reduction import averaged
from models.layers.tokens import to_map, to_tokens


def aggregated_attention(
    site: Site,
    *,
    window: int | Sequence[int] = 3,
    sr_ratio: int | Sequence[int] = (8, 4, 2, 1),
    fixed_pool_size: int | None = None,
    pretrain_size: int | Sequence[int] | None = None,
    hidden: int = 512,
    qkv_bias: bool = True,
    backend: str = "auto",
) -> Mixer:
    """The attention of a stage of TransNeXt: aggregated where the map is pooled, cosine attention where it is not.

    Args:
        site: the place in the backbone.
        window: side of the neighbourhood, odd; one number or one per stage.
        sr_ratio: sides of the pooled map are this many times shorter, rounded down; one number or one per stage. 1 is
            cosine attention over the whole map (`cosine_attention`). A plain ViT takes the third.
        fixed_pool_size: side of the pooled map whatever the image, which makes the cost linear in tokens; null for
            sr_ratio. No map is pooled to more cells than it has.
        pretrain_size: height and width of the map that distances are measured in, see `cosine_attention`.
        hidden: hidden channels of the MLP of the bias of pooled keys.
        qkv_bias: bias of the projection.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a window that is even, or a number that is not whole and positive.
    """
    ratio, side = for_stage("sr_ratio", sr_ratio, site), for_stage("window", window, site)
    pool = 1 if fixed_pool_size is None else fixed_pool_size
    check_whole("aggregated", sr_ratio=ratio, fixed_pool_size=pool, hidden=hidden)
    check_odd("aggregated", window=side)
    check_flags("aggregated", qkv_bias=qkv_bias)
    size = measured_in(site, pretrain_size)
    if ratio == 1:
        options = {"pretrain_size": pretrain_size, "hidden": hidden, "qkv_bias": qkv_bias, "backend": backend}
        return cosine_attention(site, **options)
    reduce = PooledFeatures(site.dim, ratio, fixed_pool_size)
    core = AggregatedCore(site.num_heads, head_channels(site), side, size, hidden)
    return AggregatedAttention(site, core, reduce, qkv_bias=qkv_bias, backend=backend)


class AggregatedAttention(Mixer):
    """Projection, pooled features through the same projection, heads, gates, projection.

    Args:
        site: the place in the backbone.
        core: computes the heads.
        reduce: `(x_BNC, grid) -> (x_BPC, kv_grid)`, the pooled tokens.
        qkv_bias: bias of the projection.
        backend: "auto", "triton" or "torch"; see `models.attention.Mixer`.
    """

    accepts = Accepts(prefix="refused")
    has_queries = has_matrix = row_stochastic = True
    adds = True  # learned tokens outside of the softmax

    def __init__(
        self, site: Site, core: nn.Module, reduce: nn.Module, *, qkv_bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__(site, backend)
        self.num_heads, self.head_dim = site.num_heads, head_channels(site)
        self.inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(site.dim, 3 * self.inner, bias=qkv_bias)
        self.reduce, self.core = reduce, core
        self.proj = nn.Linear(self.inner, site.dim)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        if self.head_dim > WIDEST_HEAD:
            return Runs("aggregated attention", False, f"heads wider than {WIDEST_HEAD} channels have no kernel")
        return Runs("aggregated_attention", True)

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        pooled_BPC, kv_grid = self.reduce(x_BNC, grid)
        kv_pool, qkv = self._project(pooled_BPC, slice(self.inner, None)), self.qkv(x_BNC)
        backend = self.backend if self.runs().fused else "torch"
        o_BNC = self.core(qkv, kv_pool, grid, kv_grid, gates_BNM, backend)
        if is_explaining():
            v = self._values(qkv, kv_pool).detach()
            matrix = self.core.matrix(qkv, kv_pool, grid, kv_grid)
            o_BNC = grafted(self, matrix, lambda weights: gated_heads(merge_heads(weights @ v), gates_BNM), o_BNC)
        return Mixed(self.proj(o_BNC), {})

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The weights (B, M, N, N + P) on all tokens, 0 but in the neighbourhood, and on the pooled ones behind them.

        What the learned tokens add to them is left out, so that rows sum to one.
        """
        pooled_BPC, kv_grid = self.reduce(x_BNC, grid)
        return self.core.matrix(self.qkv(x_BNC), self._project(pooled_BPC, slice(self.inner, None)), grid, kv_grid)

    def over_tokens(self, matrix: Tensor, x_BNC: Tensor, grid: Grid) -> TokenWeights:
        """See `models.attention.Mixer`; the weight of a pooled token is spread over the cells that it averages."""
        near, pooled = matrix.split([grid.tokens, matrix.shape[-1] - grid.tokens], dim=-1)
        kv_grid = self.reduce.reduced(grid)
        cells = averaged(grid.height, kv_grid.height), averaged(grid.width, kv_grid.width)
        return TokenWeights(near + TokenWeights(pooled, grid, kv_grid, cells).on_tokens(), grid, grid)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        kv_pool = self._project(self.reduce(x_BNC, grid)[0], slice(self.inner, None))
        return self.proj(merge_heads(weights @ self._values(self.qkv(x_BNC), kv_pool)))

    def _values(self, qkv_BNC: Tensor, kv_pool_BPC: Tensor) -> Tensor:
        """(B, M, N + P, D): of all tokens and of the pooled ones."""
        parts = split_heads(qkv_BNC, 3, self.num_heads)[2], split_heads(kv_pool_BPC, 2, self.num_heads)[1]
        return torch.cat(parts, dim=2)

    def queries(self, x_BNC: Tensor) -> Tensor:
        """Queries (B, M, N, D) of the tokens, before they are normalised."""
        return split_heads(self._project(x_BNC, slice(self.inner)), 1, self.num_heads)[0]

    def _project(self, x_BNC: Tensor, rows: slice) -> Tensor:
        """Queries, or keys and values, alone: some rows of the packed projection."""
        return F.linear(x_BNC, self.qkv.weight[rows], None if self.qkv.bias is None else self.qkv.bias[rows])


class AggregatedCore(nn.Module):
    """The heads of aggregated attention with their parameters; τ = softplus(temperature) starts at 1 / 0.24."""

    def __init__(
        self, num_heads: int, head_dim: int, window: int, pretrain_size: tuple[int, int], hidden: int = 512
    ) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        cells = window * window
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, cells))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, head_dim, cells))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, cells))
        self.bias = ContinuousPositionBias(num_heads, pretrain_size, hidden)
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)

    def forward(
        self,
        qkv_BNC: Tensor,
        kv_pool_BPC: Tensor,
        grid: Grid,
        kv_grid: Grid,
        gates_BNM: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """All heads of every token (B, N, M·D), from packed queries, keys and values and packed pooled ones."""
        with full_precision(qkv_BNC.device):
            scale_M = F.softplus(self.temperature.float()).flatten()
            pool_bias_MNP = self.bias(grid, kv_grid)
        return aggregated_heads(
            qkv_BNC, kv_pool_BPC, scale_M, self.query_embedding.flatten(1), self.relative_pos_bias_local, pool_bias_MNP,
            self.learnable_tokens, self.learnable_bias.flatten(1), tuple(grid[:2]), self.num_heads, self.window,
            gates_BNM=gates_BNM, backend=backend,
        )  # fmt: skip

    def matrix(self, qkv_BNC: Tensor, kv_pool_BPC: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The softmax over neighbours and pooled tokens, (B, M, N, N + P): quadratic, for looking at and for tests."""
        (q, k, _), (k_pool, _) = split_heads(qkv_BNC, 3, self.num_heads), split_heads(kv_pool_BPC, 2, self.num_heads)
        with full_precision(q.device):
            q, k, k_pool = (F.normalize(wide(t), dim=-1, eps=EPSILON) for t in (q, k, k_pool))
            place_NN, near_NN = self._places(grid, q.device)
            keys_N1 = near_NN.sum(-1, keepdim=True) + k_pool.shape[2]
            scale_MN1 = F.softplus(self.temperature.to(q.dtype)) * keys_N1.to(q.dtype).log()
            scaled = (q + self.query_embedding.to(q.dtype)) * scale_MN1
            local = scaled @ k.mT + self.relative_pos_bias_local.to(q.dtype)[:, place_NN]
            pooled = scaled @ k_pool.mT + self.bias(grid, kv_grid).to(q.dtype)
            return torch.cat([local.masked_fill(~near_NN, float("-inf")), pooled], dim=-1).softmax(-1)

    def _places(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which cell of the neighbourhood of each token every token is, and whether it is one: (N, N) each."""
        radius = self.window // 2
        y, x = (torch.arange(side, device=device) for side in grid[:2])
        y, x = ((key[None] - key[:, None] + radius) for key in (y, x))
        y, x = y[:, None, :, None], x[None, :, None, :]
        near = (y >= 0) & (y < self.window) & (x >= 0) & (x < self.window)
        place = y.clamp(0, self.window - 1) * self.window + x.clamp(0, self.window - 1)
        return place.flatten(2).flatten(0, 1), near.flatten(2).flatten(0, 1)


class PooledFeatures(nn.Module):
    """1×1 convolution, GELU, average pooling, LayerNorm: (x_BNC, grid) → (x_BPC, kv_grid).

    Args:
        dim: channels C.
        ratio: how many times shorter the sides of the pooled map are, rounded down.
        size: the side of the pooled map instead, or of the map where that is shorter; None for `ratio`.
    """

    def __init__(self, dim: int, ratio: int, size: int | None = None) -> None:
        super().__init__()
        self.ratio, self.size = ratio, size
        self.conv = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=1e-5)  # those of the blocks have 1e-6

    def reduced(self, grid: Grid) -> Grid:
        """The pooled map of a map."""
        sides = (max(side // self.ratio, 1) if self.size is None else min(self.size, side) for side in grid[:2])
        return Grid(*sides)

    def forward(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        kv_grid = self.reduced(grid)
        x_BCHW = F.gelu(self.conv(to_map(x_BNC, grid)))
        if grid.height % kv_grid.height or grid.width % kv_grid.width:
            pooled_BCHW = F.adaptive_avg_pool2d(x_BCHW, kv_grid[:2])
        else:  # the same; on a GPU its gradient is reproducible
            pooled_BCHW = F.avg_pool2d(x_BCHW, (grid.height // kv_grid.height, grid.width // kv_grid.width))
        return self.norm(to_tokens(pooled_BCHW)), kv_grid
