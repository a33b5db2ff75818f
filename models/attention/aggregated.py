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
from kernels.dispatch import WIDEST_HEAD
from kernels.precision import full_precision
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site
from models.attention.contract.heads import head_channels, split_heads
from models.attention.contract.options import check_flags, check_odd, check_whole, for_stage
from models.attention.cosine import ContinuousPositionBias, cosine_attention, measured_in
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
    has_queries = True

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
        kv_pool = self._project(pooled_BPC, slice(self.inner, None))
        backend = self.backend if self.runs().fused else "torch"
        return Mixed(self.proj(self.core(self.qkv(x_BNC), kv_pool, grid, kv_grid, gates_BNM, backend)), {})

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
