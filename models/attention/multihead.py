"""Multi-head token mixing: projection → layout → core → head gate → projection.

The layout decides who may see whom (the whole map, windows, or keys from a reduced map); the core computes the heads;
gates, when given, weight every head of every token before the output projection.

Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head; W = B·windows and T = tokens in a window
take the places of B and N inside a windowed layout.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import windows
from kernels.dispatch import WIDEST_HEAD, is_fused
from kernels.heads import gated
from models.attention import Accepts, Grid, Mixed, Mixer, Runs, Site
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import ratio_of
from models.layers.reduction import PooledReduction, SpatialReduction
from models.layers.resizable import Resizable


class Core(nn.Module):
    """Computes the heads of one sequence of tokens: `core(q_BMND, k_BMSD, v_BMSD, grid, kv_grid) -> o_BMND`.

    `grid` and `kv_grid` are the maps of the queries and of the keys and values (equal unless the layout reduces the
    keys). One that finds windows, as only such a layout needs it, also takes `mask`, (R, T, T): bool and True where a
    pair may attend, or numbers that are added to the logits.

    One whose `runs` is fused has `fused(qkv_BNC, grid, num_heads, ...) -> o_BNC`, which computes the same from the
    packed projection (B, N, 3·M·D). Where its kernel finds the windows by itself, that also takes `window`, `shift` and
    the `padding` that completes the map; where it weights the heads, `gates`.

    Attributes:
        finds_windows: whether the kernel finds the windows of a map.
        reads_tokens: whether both ways of computing also take what `context` gives, as keywords.
        reads_stream: whether that is read from the input of the block, before its norm, instead of that of the layer.
    """

    finds_windows = False
    reads_tokens = False
    reads_stream = False

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """The kernel that computes the heads in such windows, gated or not."""
        return Runs(type(self).__name__, False, "it is written in PyTorch")

    def context(self, x_BNC: Tensor) -> dict[str, Tensor]:
        """What it reads from the tokens of each sequence besides queries, keys and values."""
        return {}

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S) of every query on every key; with `mask` as it is called.

        Raises:
            TypeError: it has none.
        """
        raise TypeError(f"attention_matrix: {type(self).__name__} has no attention matrix")


class MultiHead(Resizable, Mixer):
    """Projection → layout → core → gate → projection.

    Args:
        site: the place in the backbone.
        core: computes the heads; see `Core`.
        window: height and width of the windows that tokens see; None for the whole map.
        shift: how far the windows are rolled, (0, 0) for not at all.
        stored_mask: keep the mask of shifted windows for the map of the site among the weights, as the files of Swin
            do; then a file may bring another one, which holds for maps of that size.
        reduce: module `(x_BNC, grid) -> (x_BSC, kv_grid)` that shortens the sequence of keys and values; None for none.
        qkv_bias: whether queries, keys and values have a bias.
        head_dim: channels per head D; None for C / M.
        accepts: what it can take, where that is not what the layout can: class tokens on the whole map alone.
        backend: "auto", "triton" or "torch"; see `models.attention.Mixer`.
    """

    has_queries = True

    def __init__(
        self,
        site: Site,
        core: Core,
        *,
        window: tuple[int, int] | None = None,
        shift: tuple[int, int] = (0, 0),
        stored_mask: bool = False,
        reduce: nn.Module | None = None,
        qkv_bias: bool = True,
        head_dim: int | None = None,
        accepts: Accepts | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(site, backend)
        self.num_heads, self.head_dim = site.num_heads, head_dim or head_channels(site)
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(site.dim, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, site.dim)
        self.core, self.reduce, self.window, self.shift = core, reduce, window, shift
        self.reads_stream = core.reads_stream
        self.accepts = accepts or Accepts(prefix="attended" if window is None and reduce is None else "refused")
        self.grid, self.usual_mask = site.grid, True
        mask = self._usual_mask(torch.get_default_device()) if stored_mask and any(shift) else None
        self.register_buffer("shift_mask", mask)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        if self.reduce is not None:
            return Runs(type(self.core).__name__, False, "its keys come from a map of another size than its queries")
        if self.head_dim > WIDEST_HEAD:
            return Runs(type(self.core).__name__, False, f"heads wider than {WIDEST_HEAD} channels have no kernel")
        if not self.usual_mask:
            return Runs(type(self.core).__name__, False, "its file brought a mask of shifted windows of its own")
        return self.core.runs(self.window, gated)

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A stored mask for a map of another size becomes the one for the map of the site; the rest stays as it is."""
        return self._usual_mask(value.device) if name == "shift_mask" else value

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.shift_mask is not None and not self.shift_mask.is_meta:
            self.usual_mask = torch.equal(self.shift_mask, self._usual_mask(self.shift_mask.device))

    def _usual_mask(self, device: torch.device) -> Tensor:
        """(R, T, T): 0 where a pair may attend and -100 where not, as in the files of Swin."""
        mask = windows.shift_mask(*self.grid[:2], self.window, self.shift, device)
        return torch.where(mask, 0.0, -100.0)

    def forward(
        self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None, stream_BNC: Tensor | None = None
    ) -> Mixed:
        runs = self.runs(gated=gates_BNM is not None)
        if runs.fused and is_fused(runs.operation, self.backend, x_BNC):
            return Mixed(self._forward_fused(x_BNC, grid, gates_BNM, stream_BNC), {})
        x, local = self._split(x_BNC, grid)
        q, k, v, kv_grid = self._project(x, local)
        given = self._context(x_BNC, stream_BNC, grid)
        if (mask := self._mask(grid, x.device)) is not None:
            given["mask"] = mask
        o_BMND = self.core(q, k, v, local, kv_grid, **given)
        if gates_BNM is not None:
            gates, _ = self._split(gates_BNM, grid)
            o_BMND = gated(o_BMND, gates)
        o = self.proj(merge_heads(o_BMND))
        return Mixed(
            o if self.window is None else windows.merge(o, grid.height, grid.width, self.window, self.shift), {}
        )

    def _forward_fused(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None, stream_BNC: Tensor | None) -> Tensor:
        """The same from the packed projection: queries, keys and values are never separated or copied."""
        if self.window is not None and self.core.finds_windows:
            layout = {"window": self.window, "shift": self.shift, "padding": self.qkv.bias}
            o_BNC = self.core.fused(self.qkv(x_BNC), grid, self.num_heads, **layout)
            return self.proj(gated_heads(o_BNC, gates_BNM))
        if gates_BNM is not None and self.core.runs(self.window, gated=True).operation == "moh_attention":
            return self.proj(self.core.fused(self.qkv(x_BNC), grid, self.num_heads, gates=gates_BNM))
        x, local = self._split(x_BNC, grid)
        o_BNC = self.core.fused(self.qkv(x), local, self.num_heads, **self._context(x_BNC, stream_BNC, grid))
        gates = None if gates_BNM is None else self._split(gates_BNM, grid)[0]
        o_BNC = self.proj(gated_heads(o_BNC, gates))
        if self.window is None:
            return o_BNC
        return windows.merge(o_BNC, grid.height, grid.width, self.window, self.shift)

    def queries(self, x_BNC: Tensor) -> Tensor:
        """Queries (B, M, N, D) of the tokens, whatever windows they see."""
        inner = self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[:inner]
        return split_heads(F.linear(x_BNC, self.qkv.weight[:inner], bias), 1, self.num_heads)[0]

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, M, N, S) of every query on every key; of each window, (B·R, M, T, T), in a windowed layout.

        Raises:
            TypeError: the core has no matrix.
        """
        x, local = self._split(x_BNC, grid)
        q, k, _, kv_grid = self._project(x, local)
        mask = self._mask(grid, x.device)
        return self.core.matrix(q, k, local, kv_grid) if mask is None else self.core.matrix(q, k, local, kv_grid, mask)

    def _context(self, x_BNC: Tensor, stream_BNC: Tensor | None, grid: Grid) -> dict[str, Tensor]:
        """What the core reads from the tokens: of the layer, or of the block where it reads the stream."""
        if not self.core.reads_tokens:
            return {}
        return self.core.context(self._split(stream_BNC if self.reads_stream else x_BNC, grid)[0])

    def _split(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        if self.window is None:
            return x, grid
        return windows.split(x, grid.height, grid.width, self.window, self.shift), Grid(*self.window)

    def _mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        if self.window is None or not any(self.shift):
            return None
        if self.shift_mask is not None and grid[:2] == self.grid[:2]:
            return self.shift_mask
        return windows.shift_mask(grid.height, grid.width, self.window, self.shift, device)

    def _project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Grid]:
        """Queries (B, M, N, D), keys and values (B, M, S, D), and the map of the keys."""
        if self.reduce is None:
            q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
            return q, k, v, grid
        inner = self.num_heads * self.head_dim
        reduced, kv_grid = self.reduce(x, grid)
        bias = None if self.qkv.bias is None else self.qkv.bias[inner:]
        k, v = split_heads(F.linear(reduced, self.qkv.weight[inner:], bias), 2, self.num_heads)
        return self.queries(x), k, v, kv_grid


def reduction(site: Site, sr_ratio: int | Sequence[int] = 1, kv_pool: int | None = None) -> nn.Module | None:
    """What shortens keys and values: a convolution with stride `sr_ratio`, pooling to side `kv_pool`, or nothing.

    Raises:
        ValueError: see `ratio_of`.
    """
    ratio = ratio_of(site, sr_ratio, kv_pool)
    if kv_pool is not None:
        return PooledReduction(site.dim, kv_pool)
    return None if ratio == 1 else SpatialReduction(site.dim, ratio)
