"""ContMix: every token weighs its neighbours by how alike it is to the cells of a coarse map of its context.

Source: OverLoCK, Lou & Yu, CVPR 2025, arXiv:2502.20087, section 3.3; code: LMMMEng/OverLoCK at commit 2c8ab3b. With
2·heads groups, G of them, and P = 49 pooled cells of the context c: A = τ q (pool(c) W_k)ᵀ, L = A W + b, and
softmax(L + bias) over S² neighbours for the first half of the values' channels, over K² for the second. As in the code
queries and keys have C/2 channels while τ is that of C, W is shared by the groups, neighbours and biases are those of
NATTEN, and a map with sides below K is enlarged before and averaged behind. Elsewhere than in an OverLoCK queries,
context and values are all made of the tokens, as in the authors' `ContMixBlock`.
Shapes: B = batch, N = H·W tokens, C = channels, G = groups per half, D = C/4·heads, P = pooled cells, K S = kernels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from models.attention import Accepts, Grid, Mixed, Mixer, Refused, Site
from models.attention.biases.rpb import NeighborBias
from models.attention.contract.explaining import is_explaining, note
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_odd, for_stage
from models.attention.layouts.neighborhood import Neighborhood, gathered
from models.layers.norm import TokenBatchNorm
from models.layers.tokens import to_map, to_tokens

SIDE = 7  # of the pooled context


class ContMix(Mixer):
    """(B, N, C) → (B, N, C), for any map. Gates (B, N, M) weight the channels of each head before the projection.

    Args:
        site: the place in the backbone; with a `context` queries and keys are those of its two streams, and the
            tokens themselves are the values.
        kernel_size: K of the second half of the channels, odd, one number or one per stage; a plain ViT takes the
            third.
        small_kernel: S of the first half, odd, at most K.
        backend: "auto" or "torch"; there is no kernel.

    Raises:
        ValueError: an even kernel, or a small one above the other.
        Refused: channels that do not divide into four parts of each head.
    """

    FOLDS = (("q", "q_norm"), ("k", "k_norm"), ("v", "v_norm"), ("proj", "proj_norm"))
    accepts = Accepts(prefix="refused")
    row_stochastic = True

    def __init__(
        self,
        site: Site,
        *,
        kernel_size: int | Sequence[int] = (17, 15, 13, 7),
        small_kernel: int = 5,
        backend: str = "auto",
    ) -> None:
        large = for_stage("kernel_size", kernel_size, site)
        check_odd("contmix", kernel_size=large, small_kernel=small_kernel)
        _check(site, large, small_kernel)
        super().__init__(site, backend)
        dim, self.groups = site.dim, 2 * site.num_heads
        self.reads_stream = self.reads_context = bool(site.context)
        self.has_matrix = not site.context
        self.without_matrix = "" if self.has_matrix else "its weights are made of another stream beside the tokens"
        self.kernels = [Neighborhood((side, side)) for side in (small_kernel, large)]
        self.biases = nn.ModuleList(NeighborBias(self.groups, layout.kernel) for layout in self.kernels)
        self.q, self.q_norm = nn.Linear(dim, dim // 2, bias=False), TokenBatchNorm(dim // 2)
        self.k, self.k_norm = nn.Linear(site.context or dim, dim // 2, bias=False), TokenBatchNorm(dim // 2)
        self.weigh = nn.Linear(SIDE * SIDE, small_kernel**2 + large**2)
        self.v = nn.Identity() if site.context else nn.Linear(dim, dim, bias=False)
        self.v_norm = nn.Identity() if site.context else TokenBatchNorm(dim)
        self.proj, self.proj_norm = nn.Linear(dim, dim, bias=False), TokenBatchNorm(dim)
        for bias in self.biases if site.context else ():
            nn.init.zeros_(bias.table)

    def forward(
        self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None, stream_BNC: Tensor | None = None
    ) -> Mixed:
        v_BNC, size = self.v_norm(self.v(x_BNC)), self.enlarged(grid)
        logits = self._logits(resized(x_BNC if stream_BNC is None else stream_BNC, grid, size), size)
        if is_explaining():
            o_BNC = self._weighed(note(self, self._matrix(logits, grid, size)), v_BNC)
        else:
            halves = resized(v_BNC, grid, size).chunk(2, dim=-1)
            near = [self._near(i, weights, halves[i], size) for i, weights in enumerate(self._weights(logits, size))]
            o_BNC = averaged(torch.cat(near, dim=-1), size, grid)
        return Mixed(self.proj_norm(self.proj(gated_heads(o_BNC, gates_BNM))), {})

    def enlarged(self, grid: Grid) -> Grid:
        """The map on which tokens are mixed: the shorter side has at least K cells."""
        least, (height, width) = self.kernels[1].kernel[0], grid[:2]
        if min(height, width) >= least:
            return grid
        longer = max(int(least / min(height, width) * max(height, width)), least)
        return Grid(least, longer) if height < width else Grid(longer, least)

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, 2·G, N, N): of the small kernel for the first half of the channels, then of the large one."""
        if not self.has_matrix:
            return super().attention_matrix(x_BNC, grid)
        size = self.enlarged(grid)
        return self._matrix(self._logits(resized(x_BNC, grid, size), size), grid, size)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self.proj_norm(self.proj(self._weighed(weights, self.v_norm(self.v(x_BNC)))))

    def _logits(self, u_BNC: Tensor, grid: Grid) -> list[Tensor]:
        """(B, G, N, S²) and (B, G, N, K²), without the biases."""
        C = self.site.dim
        context_BNC = u_BNC[..., C:] if self.site.context else u_BNC
        pooled_BPC = to_tokens(F.adaptive_avg_pool2d(to_map(context_BNC, grid), SIDE))
        q_BGND = split_heads(self.q_norm(self.q(u_BNC[..., :C])), 1, self.groups)[0]
        k_BGPD = split_heads(self.k_norm(self.k(pooled_BPC)), 1, self.groups)[0]
        a_BGNP = (q_BGND * (C // self.groups) ** -0.5) @ k_BGPD.mT
        return self.weigh(a_BGNP).split([layout.kernel[0] ** 2 for layout in self.kernels], dim=-1)

    def _weights(self, logits: Sequence[Tensor], grid: Grid) -> list[Tensor]:
        """Those of each half on the neighbours, which sum to one."""
        offsets = [layout.offsets(layout.around.axes(grid, logits[0].device)) for layout in self.kernels]
        biases = [bias.at(of)[:, :, 0] for bias, of in zip(self.biases, offsets, strict=True)]
        return [(part + bias.to(part.dtype)).softmax(-1) for part, bias in zip(logits, biases, strict=True)]

    def _near(self, half: int, weights_BGNK: Tensor, v_BNC: Tensor, grid: Grid) -> Tensor:
        """The values (B, N, C/2) of a half, each the sum of those around it."""
        axes = self.kernels[half].around.axes(grid, v_BNC.device)
        near_XGKD = gathered(split_heads(v_BNC, 1, self.groups)[0], grid, *axes)  # X = B·N
        weights_XG1K = weights_BGNK.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return (weights_XG1K.to(near_XGKD.dtype) @ near_XGKD).flatten(1).view(v_BNC.shape)

    def _matrix(self, logits: Sequence[Tensor], grid: Grid, size: Grid) -> Tensor:
        dense = []
        for layout, weights in zip(self.kernels, self._weights(logits, size), strict=True):
            rows_HK, columns_WK = layout.around.axes(size, weights.device)
            cells_NK = (rows_HK[:, None, :, None] * size.width + columns_WK[:, None]).flatten(2).flatten(0, 1)
            spread = weights.new_zeros(*weights.shape[:3], size.cells)
            dense.append(spread.scatter_add(-1, cells_NK.expand_as(weights), weights))
        whole = torch.cat(dense, dim=1)
        if size == grid:
            return whole
        each = torch.eye(grid.cells, device=whole.device, dtype=whole.dtype)
        enlarging_N = resized(each[None], grid, size)[0]  # (cells of `size`, N)
        return averaged((whole @ enlarging_N).flatten(0, 1), size, grid).unflatten(0, whole.shape[:2])

    def _weighed(self, weights_BGNN: Tensor, v_BNC: Tensor) -> Tensor:
        v_BGND = split_heads(v_BNC, 1, 2 * self.groups)[0]
        return merge_heads(weights_BGNN.to(v_BGND.dtype) @ v_BGND)


def resized(x_BNC: Tensor, grid: Grid, size: Grid) -> Tensor:
    """The tokens of a map on one of another size, bilinearly."""
    if size == grid:
        return x_BNC
    return to_tokens(F.interpolate(to_map(x_BNC, grid), size=tuple(size[:2]), mode="bilinear"))


def averaged(x_BNC: Tensor, size: Grid, grid: Grid) -> Tensor:
    """The way back to a smaller map: the means of its cells."""
    return x_BNC if size == grid else to_tokens(F.adaptive_avg_pool2d(to_map(x_BNC, size), tuple(grid[:2])))


def _check(site: Site, large: int, small: int) -> None:
    if small > large:
        raise UserError(
            f"contmix: small_kernel must be at most kernel_size {large}, got {small}; set attention.small_kernel"
        )
    head_channels(site, even=True)
    if site.dim % (4 * site.num_heads):
        raise Refused(
            f"{site.dim} channels do not divide into four parts for each of {site.num_heads} heads",
            "change model.num_heads or model.dim, or choose attention=neighborhood",
        )
