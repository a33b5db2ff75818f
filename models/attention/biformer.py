"""Bi-level routing attention: every region of the map attends to the few regions that are most alike to it.

Source: BiFormer, Zhu et al., CVPR 2023, arXiv:2303.08810, section 3.2. With q, k, v = split(x W + b):
    A = mean_region(q) mean_region(k)ᵀ;  I = topk(A);  o = softmax(q gather(k, I)ᵀ / √C) gather(v, I) + LePE(v).
The scale is that of the authors' code: the channels of all heads together, not of one head. Two codes of the authors
differ on maps that do not divide into regions; see `padding`. In both, padded keys take part in the softmax.

Shapes: B = batch, N = H·W tokens, C = channels, M = heads, D = channels per head, R = regions, T = tokens in a region,
S = keys in a region, K = regions attended to, W = B·R.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels import windows
from kernels.depthwise_conv import LARGEST
from kernels.dispatch import WIDEST_HEAD, is_fused
from kernels.precision import full_precision
from kernels.routed_attention import MOST_SELECTED_FROM, means, ranked, region_means, routed_attention, select_regions
from kernels.routed_attention import definition as routed_regions
from models.attention import Accepts, Grid, Mixed, Mixer, Refused, Runs, Site
from models.attention.contract.explaining import grafted, is_explaining
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_flags, check_whole, for_stage
from models.attention.lepe import ConvMixer, LePEAttention, check_lepe, depthwise, enhance
from models.layers.tokens import to_map, to_tokens

ROUTINGS = ("hard", "soft_detached", "soft", "soft_learned")
PADDINGS = ("input", "qkv")


class Regions(NamedTuple):
    """How a map is cut: rows and columns of regions, and the tokens along both sides of one; some may lie beyond it."""

    rows: int
    columns: int
    height: int
    width: int


def biformer_attention(
    site: Site,
    *,
    topk: int | str | Sequence[int | str] = (1, 4, 16, "all"),
    num_regions: int = 7,
    lepe_kernel: int = 5,
    lepe_input: str = "x",
    qk_dim: int | None = None,
    padding: str = "input",
    routing: str = "hard",
    kv_pool: nn.Module | None = None,
    output_projection: bool = True,
    backend: str = "auto",
) -> Mixer:
    """The attention of a stage of BiFormer: routed where the map is large, dense where it is small.

    Args:
        site: the place in the backbone.
        topk: regions that each region attends to, one number or one per stage; the paper's are 1, 4, 16 and all. "all"
            (or -1) is dense attention (`LePEAttention`), 0 none at all (`ConvMixer`). A plain ViT takes the third.
        lepe_kernel: side of the depth-wise convolution that is added (LePE); 0 for none.
        lepe_input: what it convolves in dense attention, see `LePEAttention`.
        num_regions, qk_dim, padding, routing, kv_pool, output_projection: where attention is routed, see
            `BiLevelRoutingAttention`; checked in every stage.
        backend: "auto", "triton" or "torch".

    Raises:
        Refused: the list has no entry for the stage; or see the three classes.
        ValueError: an option has no meaning.
    """
    chosen = for_stage("topk", topk, site)
    none, dense = chosen == 0 and not isinstance(chosen, bool), chosen in ("all", -1)
    routed = {
        "num_regions": num_regions, "lepe_kernel": lepe_kernel, "qk_dim": qk_dim, "padding": padding,
        "routing": routing, "kv_pool": kv_pool, "output_projection": output_projection,
    }  # fmt: skip
    check_lepe("biformer", lepe_kernel, lepe_input)
    check_routed(topk=1 if none or dense else chosen, **routed)
    if none:
        return ConvMixer(site, backend=backend)
    if dense:
        return LePEAttention(site, lepe_kernel=lepe_kernel, lepe_input=lepe_input, backend=backend)
    return BiLevelRoutingAttention(site, topk=chosen, backend=backend, **routed)


class BiLevelRoutingAttention(Mixer):
    """Attention to the `topk` regions whose mean key best matches a region's mean query.

    Args:
        site: the place in the backbone.
        num_regions: regions per side of the map (the authors' `n_win`). Where the map that the model is built for is
            smaller, and always under padding "qkv", it is cut to the side of the map; otherwise a smaller map of a
            forward pass is padded to it, as the authors do.
        topk: regions that each region attends to. A map that a forward pass brings may have fewer regions than `topk`:
            then all of them are attended to.
        lepe_kernel: side of the depth-wise convolution of the values that is added (LePE); 0 for none.
        qk_dim: channels of queries and keys together; C by default.
        padding: "input" pads the map with zeros up to whole regions before the projection, so that padded keys equal
            its bias and enter the means; "qkv" pads queries, keys and values with zeros, leaves padding out of the
            means, and makes regions of the rounded-down size, hence more of them.
        routing: "hard" selects only. The authors' experiments also weight the selected keys and values by the softmax
            of their affinities: "soft_detached" without gradient through it, "soft" with, "soft_learned" with a learned
            embedding of the means as well.
        kv_pool: module (W, C, height, width) → (W, C, height', width') without parameters that thins out the keys and
            values of each region, e.g. `nn.AdaptiveAvgPool2d(2)`; None for none.
        output_projection: False leaves the last projection out.
        backend: "auto", "triton" or "torch".

    Raises:
        Refused: the heads do not divide the channels, or the map has fewer than `topk` regions.
        ValueError: an option has no meaning.
    """

    accepts = Accepts(prefix="refused")
    row_stochastic = True
    without_matrix = "keys of a region are pooled (kv_pool), or its routing is soft"

    def __init__(
        self,
        site: Site,
        *,
        num_regions: int = 7,
        topk: int = 4,
        lepe_kernel: int = 5,
        qk_dim: int | None = None,
        padding: str = "input",
        routing: str = "hard",
        kv_pool: nn.Module | None = None,
        output_projection: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(site, backend)
        check_routed(num_regions, topk, lepe_kernel, qk_dim, padding, routing, kv_pool, output_projection)
        self.topk = topk
        self.num_heads, self.num_regions, self.padding, self.dim = site.num_heads, num_regions, padding, site.dim
        self.qk_dim = site.dim if qk_dim is None else qk_dim
        self.cut = padding == "qkv" or min(site.grid[:2]) < num_regions
        self._check_site(site)
        self.scale = self.qk_dim**-0.5
        self.qkv = nn.Linear(site.dim, 2 * self.qk_dim + site.dim)
        self.router = RegionRouter(self.qk_dim, topk, routing)
        self.kv_pool = kv_pool
        self.lepe = depthwise(site.dim, lepe_kernel)
        self.has_matrix, self.adds = kv_pool is None and routing == "hard", self.lepe is not None
        self.proj = nn.Linear(site.dim, site.dim) if output_projection else nn.Identity()

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        x, tiled, size = self._tile(x_BNC, grid)
        fused = self.runs().fused and is_fused("routed_attention", self.backend, x)
        o = _crop((self._forward_fused if fused else self._in_pytorch)(x, tiled, size), tiled, grid)
        if is_explaining() and self.has_matrix:
            v_BMND = self._values(x_BNC).detach()
            o = grafted(self, self.attention_matrix(x_BNC, grid), lambda weights: merge_heads(weights @ v_BMND), o)
        return Mixed(self.proj(gated_heads(o, gates_BNM)), {})

    def _in_pytorch(self, x: Tensor, tiled: Grid, size: tuple[int, int]) -> Tensor:
        """Attention and LePE on the map that is cut into regions."""
        qkv_BNC = self.qkv(x)
        routes_BRK, weights_BRK = self.router(*self._means(x, qkv_BNC, tiled, size), self.scale)
        q_BNC, k_BNC, v_BNC = qkv_BNC.split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        q_WTC, k_WTC, v_WTC = (windows.split(t, tiled.height, tiled.width, size) for t in (q_BNC, k_BNC, v_BNC))
        k_WSC, v_WSC = (self._pool(t, size) for t in (k_WTC, v_WTC))
        o_WTC = routed_regions(
            q_WTC, k_WSC, v_WSC, routes_BRK, self.num_heads, scale=self.scale, weights_BRK=weights_BRK
        )
        o = windows.merge(o_WTC, tiled.height, tiled.width, size)
        return o if self.lepe is None else enhance(self.lepe, v_BNC, tiled, o, self.backend)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        if self.router.kind != "hard" or self.kv_pool is not None:
            return Runs("routed attention", False, "soft routing and kv_pool are experiments that have no kernel")
        if self.lepe is not None and self.lepe.kernel_size[0] > LARGEST:
            return Runs("routed attention", False, f"the kernel goes up to {LARGEST}x{LARGEST} LePE weights")
        if self.num_regions**2 > MOST_SELECTED_FROM:
            return Runs("routed attention", False, f"the kernel selects among at most {MOST_SELECTED_FROM} regions")
        if max(self.dim, self.qk_dim) // self.num_heads > WIDEST_HEAD:
            return Runs("routed attention", False, f"heads wider than {WIDEST_HEAD} channels have no kernel")
        return Runs("routed_attention", True)

    def _forward_fused(self, x_BNC: Tensor, tiled: Grid, size: tuple[int, int]) -> Tensor:
        """Attention and LePE straight from the packed projection; no region is copied."""
        routes_BRK = self._routes_fused(x_BNC, tiled, size)
        lepe_weight, lepe_bias = (None, None) if self.lepe is None else (self.lepe.weight, self.lepe.bias)
        return routed_attention(
            self.qkv(x_BNC), routes_BRK, tiled[:2], size, self.num_heads, qk_dim=self.qk_dim, scale=self.scale,
            lepe_weight=lepe_weight, lepe_bias=lepe_bias, backend=self.backend,
        )  # fmt: skip

    @torch.no_grad()
    def _routes_fused(self, x_BNC: Tensor, tiled: Grid, size: tuple[int, int]) -> Tensor:
        mean_BRC = region_means(x_BNC, tiled[:2], size, backend=self.backend)
        with full_precision(x_BNC.device):
            weight, bias = (p[: 2 * self.qk_dim].float() for p in (self.qkv.weight, self.qkv.bias))
            q_BRC, k_BRC = F.linear(mean_BRC, weight, bias).chunk(2, dim=-1)
        topk = min(self.router.topk, mean_BRC.shape[1])
        return select_regions(q_BRC, k_BRC, topk, self.scale, backend=self.backend)

    @torch.no_grad()
    def routes(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The regions (B, R, K) that each region attends to, best first; regions are numbered row by row."""
        x, tiled, size = self._tile(x_BNC, grid)
        return self.router(*self._means(x, self.qkv(x), tiled, size), self.scale)[0]

    def regions(self, grid: Grid) -> Regions:
        """How `routes` counts the regions of a map."""
        sides, size = self._sides(grid), self._size(grid)
        if self.padding == "qkv":
            sides = [-(-side // s) for side, s in zip(grid[:2], size, strict=True)]
        return Regions(*sides, *size)

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, M, N, N) of every query on every key, 0 outside the routes; mass on padded keys is left out.

        Raises:
            TypeError: with pooled keys or soft routing there is no weight per token.
        """
        if not self.has_matrix:
            raise TypeError("BiLevelRoutingAttention: no attention matrix with kv_pool or soft routing")
        x, tiled, size = self._tile(x_BNC, grid)
        q_BNC, k_BNC, _ = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        height, width = (windows.padded(side, s) for side, s in zip(tiled[:2], size, strict=True))
        q, k = (_extend(t, tiled, Grid(height, width)) for t in (q_BNC, k_BNC))
        (q_BMND,), (k_BMND,) = (split_heads(t, 1, self.num_heads) for t in (q, k))
        logits = (q_BMND @ k_BMND.mT).float() * self.scale
        open_BRR = _routed(self.routes(x_BNC, grid))
        region = _region_of_token(height, width, size, x.device)
        logits = logits.masked_fill(~open_BRR[:, region][:, :, region].unsqueeze(1), float("-inf"))
        weights = logits.softmax(-1).unflatten(-1, (height, width)).unflatten(2, (height, width))
        return weights[:, :, : grid.height, : grid.width, : grid.height, : grid.width].flatten(4).flatten(2, 3)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        return self.proj(merge_heads(weights @ self._values(x_BNC)))

    def _values(self, x_BNC: Tensor) -> Tensor:
        """Values (B, M, N, D) of the tokens."""
        return split_heads(self.qkv(x_BNC)[..., 2 * self.qk_dim :], 1, self.num_heads)[0]

    def _tile(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid, tuple[int, int]]:
        """Tokens and map to cut into regions, zero-padded under "input", and the height and width of a region."""
        size = self._size(grid)
        if self.padding == "qkv":
            return x_BNC, grid, size
        tiled = Grid(*(n * s for n, s in zip(self._sides(grid), size, strict=True)))
        return _extend(x_BNC, grid, tiled), tiled, size

    def _size(self, grid: Grid) -> tuple[int, int]:
        """Height and width of a region: rounded down under "qkv", up under "input"."""
        pairs = zip(grid[:2], self._sides(grid), strict=True)
        return tuple(side // n if self.padding == "qkv" else -(-side // n) for side, n in pairs)

    def _sides(self, grid: Grid) -> list[int]:
        return [min(self.num_regions, side) if self.cut else self.num_regions for side in grid[:2]]

    def _means(self, x_BNC: Tensor, qkv_BNC: Tensor, tiled: Grid, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mean query and key of each region, (B, R, qk_dim) in float32.

        The mean of a linear map is the linear map of the mean: where q and k have half precision, R means are projected
        anew in float32, so that half precision does not choose other regions.
        """
        exact = qkv_BNC.dtype.itemsize >= 4
        with full_precision(x_BNC.device):
            source = qkv_BNC[..., : 2 * self.qk_dim] if exact else x_BNC.float()
            mean_BRC = means(source, tiled, size)
            if not exact:
                weight, bias = (p[: 2 * self.qk_dim].float() for p in (self.qkv.weight, self.qkv.bias))
                mean_BRC = F.linear(mean_BRC, weight, bias)
            return mean_BRC.chunk(2, dim=-1)

    def _pool(self, x_WTC: Tensor, size: tuple[int, int]) -> Tensor:
        if self.kv_pool is None:
            return x_WTC
        return to_tokens(self.kv_pool(to_map(x_WTC, Grid(*size))))

    def _check_site(self, site: Site) -> None:
        head_channels(site, even=True)
        if self.qk_dim % site.num_heads:
            raise Refused(
                f"qk_dim={self.qk_dim} does not divide into {site.num_heads} heads",
                f"set attention.qk_dim to a multiple of {site.num_heads}",
            )
        rows, columns = self._sides(site.grid)
        if self.topk > rows * columns:
            raise Refused(
                f"topk={self.topk} is more than the {rows}x{columns} regions of a "
                f"{site.grid.height}x{site.grid.width} map",
                f"set attention.topk to at most {rows * columns}, or to all",
            )


class RegionRouter(nn.Module):
    """The `topk` regions of highest affinity, ties to the lowest index, and the weights of soft routing.

    Called with mean queries and keys (B, R, C) it gives indices (B, R, K), best first, and weights (B, R, K) or None.
    """

    def __init__(self, dim: int, topk: int, kind: str) -> None:
        super().__init__()
        self.topk, self.kind = topk, kind
        self.embed = nn.Linear(dim, dim) if kind == "soft_learned" else None

    def forward(self, q_BRC: Tensor, k_BRC: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        if self.kind in ("hard", "soft_detached"):
            q_BRC, k_BRC = q_BRC.detach(), k_BRC.detach()
        with full_precision(q_BRC.device):
            if self.embed is not None:
                q_BRC, k_BRC = (F.linear(t, self.embed.weight.float(), self.embed.bias.float()) for t in (q_BRC, k_BRC))
        routes_BRK, affinity_BRK = ranked(q_BRC, k_BRC, self.topk, scale)
        return routes_BRK, None if self.kind == "hard" else affinity_BRK.softmax(-1)


def check_routed(
    num_regions: int, topk: int, lepe_kernel: int, qk_dim: int | None, padding: str, routing: str,
    kv_pool: nn.Module | None, output_projection: bool,
) -> None:  # fmt: skip
    """Refuses options of `BiLevelRoutingAttention` that have no meaning at any place."""
    who = "BiLevelRoutingAttention"
    values.whole(who, "topk", topk, what="a positive number or all", fix="set attention.topk")
    check_whole(who, num_regions=num_regions, qk_dim=1 if qk_dim is None else qk_dim)
    check_lepe(who, lepe_kernel)
    values.choice(who, "padding", padding, PADDINGS, fix="set attention.padding")
    values.choice(who, "routing", routing, ROUTINGS, fix="set attention.routing")
    check_flags(who, output_projection=output_projection)
    if not isinstance(kv_pool, nn.Module | None):
        values.refuse(who, "kv_pool", "a module", kv_pool, "set attention.kv_pool._target_, or attention.kv_pool=null")


def _extend(x_BNC: Tensor, grid: Grid, larger: Grid) -> Tensor:
    """Zero tokens at the bottom and the right, up to the larger map."""
    bottom, right = larger.height - grid.height, larger.width - grid.width
    if not bottom and not right:
        return x_BNC
    return F.pad(x_BNC.unflatten(1, grid[:2]), (0, 0, 0, right, 0, bottom)).flatten(1, 2)


def _crop(x_BNC: Tensor, larger: Grid, grid: Grid) -> Tensor:
    """The inverse of `_extend`."""
    if larger[:2] == grid[:2]:
        return x_BNC
    return x_BNC.unflatten(1, larger[:2])[:, : grid.height, : grid.width].flatten(1, 2)


def _routed(routes_BRK: Tensor) -> Tensor:
    """Bool (B, R, R): whether a region attends to another."""
    B, R, _ = routes_BRK.shape
    return torch.zeros(B, R, R, dtype=torch.bool, device=routes_BRK.device).scatter(-1, routes_BRK, True)


def _region_of_token(height: int, width: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """The region of each token of a map that divides into regions, (N,)."""
    row, column = torch.arange(height, device=device) // size[0], torch.arange(width, device=device) // size[1]
    return (row[:, None] * (width // size[1]) + column).flatten()
