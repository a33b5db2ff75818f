"""Who may see whom: tokens are cut into groups that attend among themselves, and put back.

Shapes: B = batch, N = prefix + H·W tokens, C = channels, M = heads, D = channels per head; R = groups per image, T =
queries of a group, S = its keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.attention.contract import Grid

# what the keys of a group are, beside its queries
SAME = "same"  # the same tokens
SHORTENED = "shortened"  # a coarser map of the same place
RUNS = "runs"  # of tokens in raster order, pooled
SURROUNDING = "surrounding"  # a map of another place: with what lies around
SCATTERED = "scattered"  # tokens without a map
KEYS = frozenset({SAME, SHORTENED, RUNS, SURROUNDING, SCATTERED})


class Groups(NamedTuple):
    """Heads of all groups, as a core sees them."""

    q: Tensor  # (B·R, M, T, D)
    k: Tensor  # (B·R, M, S, D)
    v: Tensor  # (B·R, M, S, D)
    grid: Grid  # of the T queries
    kv_grid: Grid  # of the S keys
    given: dict[str, Tensor]  # what the core is called with besides: `mask`, `offsets`
    back: Callable[[Tensor], Tensor]  # (B·R, M, T, D) → (B, M, N, D)
    losses: dict[str, Tensor]


class Around(NamedTuple):
    """Neighbourhoods on a map: which cells each cell sees, separately along both axes."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    along: Callable[..., Tensor]  # (length, kernel, stride, dilation, device) -> cells (length, kernel)

    def axes(self, grid: Grid, device: Any) -> list[Tensor]:
        """Along each axis the cells of the keys of every cell, (side, K)."""
        sizes = zip(grid[:2], self.kernel, self.stride, self.dilation, strict=True)
        return [self.along(*size, device) for size in sizes]


class Layout:
    """The whole map, unless a layout says otherwise; an object without weights of its own.

    Tokens may be cut before the projection (`split` and `merge`: windows), so that what completes a map is projected
    too; or heads behind it (`gather`), where tokens are keys of several groups or the content decides.

    Attributes:
        keys: what the keys of a group are, one of `KEYS`.
        takes_prefix: whether class tokens in front of the map take part.
        masks: whether `mask` or `gather` may give a mask.
        window, shift: of windows that a kernel may find by itself in what `arrange` gives; None for none.
        reduce: module `(x_BNC, grid) -> (x_BSC, kv_grid)` that makes the tokens of keys and values; None: they are
            those of the queries. A mixer owns it, under this name.
        around: of neighbourhoods, which PyTorch's FlexAttention finds by itself on the map `between`; None for none.
        stride: above 1, queries are those of every so many rows and columns alone, see `asking`.
        whole_rows: whether every query sees something; one that sees nothing gets zero.
        content: module that decides the groups by what they hold; None: the map decides. A mixer owns it.
    """

    keys = SAME
    takes_prefix = True
    masks = False
    window: tuple[int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    reduce: nn.Module | None = None
    whole_rows = True
    content: nn.Module | None = None
    around: Around | None = None
    stride: int = 1

    def local(self, grid: Grid) -> Grid:
        """The map of the queries that a core sees."""
        return grid

    def kv_local(self, grid: Grid) -> Grid:
        """The map of the keys that a core sees."""
        return self.local(grid)

    def window_on(self, grid: Grid) -> tuple[int, int] | None:
        """Sides of the windows on a map, or None."""
        return self.window

    def arrange(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The map with tokens of a group next to each other, and its size."""
        return x_BNC, grid

    def restore(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The inverse of `arrange` on a map of size `grid`."""
        return x_BNC

    def split(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """(B, N, C) → (B·R, T, C), before the projection."""
        return x_BNC

    def merge(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The inverse of `split`, behind the projection."""
        return x_BNC

    def between(self, grid: Grid) -> Grid:
        """The map of the tokens that `split` gives, where `gather` cuts them."""
        return self.local(grid)

    def asking(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Of what `split` gives, the tokens that queries are made of."""
        return x_BNC

    def mask(self, grid: Grid, device: Any) -> Tensor | None:
        """Which pairs of a group may attend: bool (R, T, S), or None for all."""
        return None

    def gather(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, kv_grid: Grid, content: nn.Module | None) -> Groups:
        """Heads (B, M, N, D) of the tokens on the map `grid` that `split` gives → those of the groups.

        Args:
            q, k, v: queries, keys and values.
            grid, kv_grid: their maps.
            content: what the mixer owns for the layout, see `content`.
        """
        return Groups(q, k, v, grid, kv_grid, {}, lambda o: o, {})
