"""Windows of two directions: half of the heads in each (cross-shaped windows), or all heads in both, summed.

Source: CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652, section 3.2.
Shapes: B = batch, N = H·W tokens, C = channels, M = heads, D = channels per head, R = stripes, T = tokens in a stripe.
Maps that do not divide into stripes are completed with zero queries, keys and values at the bottom and right, as in the
authors' code for detection; their classification code stops there.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import windows
from kernels.dispatch import WIDEST_HEAD, is_fused
from models.attention.contract import Accepts, Grid, Mixed, Mixer, Refused, Runs, Site, no_matrix
from models.attention.contract.explaining import grafted, is_explaining
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.layouts.stripes import Directions
from models.attention.multihead import Core, check_layout, check_transform

MakeCore = Callable[[int, Grid, Grid], Core]  # heads, map of the queries, map of the keys
MakePart = Callable[[Site], nn.Module]


class CrossShaped(Mixer):
    """Projection, two cores in stripes, projection.

    Args:
        site: the place in the backbone; the map has no prefix tokens.
        core: makes a core, see `MakeCore`; called once for each direction.
        layout: the stripes of the two directions.
        pre: `(x_BNC, grid) -> x_BNC` in front of the projection; None for none.
        transform, value: factories of these parts, see `models.attention.multihead.MultiHead`; one for each direction.
        qkv_bias: bias of the projection.
        output_projection: whether there is one behind the cores.
        backend: "auto", "triton" or "torch".
    """

    accepts = Accepts(prefix="refused")

    def __init__(
        self,
        site: Site,
        core: MakeCore,
        layout: Directions,
        *,
        pre: nn.Module | None = None,
        transform: MakePart | None = None,
        value: MakePart | None = None,
        qkv_bias: bool = True,
        output_projection: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(site, backend)
        if site.num_heads % 2 and not layout.summed:
            raise Refused(
                f"stripes in two directions share the heads, and {site.num_heads} is odd",
                "set attention.stripe=all, or an even model.num_heads",
            )
        self.layout, self.pre = layout, pre
        self.num_heads = site.num_heads // (1 if layout.summed else 2)  # of one direction
        self.head_dim = head_channels(site, even=True)
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim) if output_projection else nn.Identity()
        grids = [Grid(*size) for size in layout.sizes(site.grid)]
        self.cores: Sequence[Core] = nn.ModuleList(core(self.num_heads, grid, grid) for grid in grids)
        check_layout(layout, self.cores[0])
        sites = [site._replace(num_heads=self.num_heads, head_dim=self.head_dim, grid=grid) for grid in grids]
        self.transforms, self.values = (make and nn.ModuleList(map(make, sites)) for make in (transform, value))
        check_transform(transform and self.transforms[0], layout, self.cores[0], value and self.values[0])
        first = self.cores[0]
        self.reads_stream, self.has_matrix, self.without_matrix = (
            first.reads_stream,
            first.has_matrix,
            first.without_matrix,
        )
        self.row_stochastic, self.adds = first.row_stochastic, first.adds or value is not None

    @property
    def stripe(self) -> int:
        """Width of the stripes."""
        return self.layout.stripe

    def sizes(self, grid: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of a vertical and of a horizontal stripe."""
        return self.layout.sizes(grid)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`; the gates are applied behind the heads."""
        runs = self.cores[0].runs(None, False)
        if self.head_dim > WIDEST_HEAD:
            return Runs(type(self.cores[0]).__name__, False, f"heads wider than {WIDEST_HEAD} channels have no kernel")
        if runs.fused and (self.transforms or self.values):
            return Runs(type(self.cores[0]).__name__, False, "parts change queries, keys or values")
        return runs

    def forward(
        self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None, stream_BNC: Tensor | None = None
    ) -> Mixed:
        x_BNC = x_BNC if self.pre is None else self.pre(x_BNC, grid)
        runs = self.runs()
        fused = runs.fused and is_fused(runs.operation, self.backend, x_BNC)
        source, shares = stream_BNC if self.reads_stream else x_BNC, 1 if self.layout.summed else 2
        sources = [source, source] if self.layout.summed else source.chunk(2, dim=-1)
        mixed = []
        directions = zip(self.layout.sizes(grid), self._projections(shares), strict=True)
        for i, (size, (weight, bias)) in enumerate(directions):
            given = self._context(self.cores[i], sources[i], grid, size)
            qkv_RTC = windows.split(F.linear(x_BNC, weight, bias), *grid[:2], size)
            compute = self.cores[i].fused if fused else self._in_pytorch(i)
            mixed.append(windows.merge(compute(qkv_RTC, Grid(*size), self.num_heads, **given), *grid[:2], size))
        o_BNC = self._joined(mixed)
        if is_explaining() and self.has_matrix:
            values = [v.detach() for v in self._values(x_BNC, grid)]
            o_BNC = grafted(self, self._matrix(x_BNC, grid), lambda weights: self._read(weights, values), o_BNC)
        return Mixed(self.proj(gated_heads(o_BNC, gates_BNM)), {})

    def _joined(self, mixed: Sequence[Tensor]) -> Tensor:
        """The heads of both directions, (B, N, channels of a direction) each."""
        return mixed[0] + mixed[1] if self.layout.summed else torch.cat(list(mixed), dim=-1)

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, M, N, N) of every query on every key of the map, the heads of vertical stripes first.

        Where both directions have all heads there are 2·M. What a row lacks to its sum lies on what completes the map.

        Raises:
            TypeError: the cores have none.
        """
        if not self.has_matrix:
            raise TypeError(no_matrix(type(self.cores[0]).__name__, self.without_matrix))
        return self._matrix(x_BNC if self.pre is None else self.pre(x_BNC, grid), grid)

    def put_back(self, o_WMTE: Tensor, grid: Grid, stripe: Grid) -> Tensor:
        """What the queries of stripes have, any number of each head, as that of all tokens (B, M, N, E)."""
        o_BNE = windows.merge(o_WMTE.transpose(1, 2).flatten(2), *grid[:2], stripe[:2])
        return o_BNE.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`."""
        x_BNC = x_BNC if self.pre is None else self.pre(x_BNC, grid)
        return self.proj(self._read(weights, self._values(x_BNC, grid)))

    def _matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        found = []
        for direction, core in enumerate(self.cores):
            q, k, _, stripe = self.stripes(direction, x_BNC, grid)
            found.append(spread(core.matrix(q, k, stripe, stripe), grid, stripe))
        return torch.cat(found, dim=1)

    def _values(self, x_BNC: Tensor, grid: Grid) -> list[Tensor]:
        """What the weights of each direction are multiplied with, (B, M, N, D) on the map."""
        found = []
        for direction, core in enumerate(self.cores):
            _, _, v, stripe = self.stripes(direction, x_BNC, grid)
            found.append(self.put_back(core.valued(v, stripe), grid, stripe))
        return found

    def _read(self, weights: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The heads (B, N, C) that these weights give."""
        directions = zip(self.cores, weights.chunk(2, dim=1), values, strict=True)
        return self._joined([merge_heads(core.finished(own.to(v.dtype) @ v)) for core, own, v in directions])

    def stripes(self, direction: int, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Grid]:
        """Queries, keys and values (B·R, M, T, D) of the stripes of a direction, and the map of one."""
        size = self.layout.sizes(grid)[direction]
        weight, bias = list(self._projections(1 if self.layout.summed else 2))[direction]
        q, k, v = split_heads(windows.split(F.linear(x_BNC, weight, bias), *grid[:2], size), 3, self.num_heads)
        if self.transforms:
            q, k, v = self.transforms[direction](q, k, v, Grid(*size), Grid(*size))
        return q, k, v, Grid(*size)

    def _projections(self, shares: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of queries, keys and values of each direction: what they give need not be copied apart."""
        bias = self.qkv.bias
        for direction in range(2):
            if shares == 1:
                yield self.qkv.weight, bias
                continue
            weight = self.qkv.weight.unflatten(0, (3, 2, -1))[:, direction].flatten(0, 1)
            yield weight, None if bias is None else bias.unflatten(0, (3, 2, -1))[:, direction].flatten(0, 1)

    def _in_pytorch(self, direction: int) -> Callable[..., Tensor]:
        def compute(qkv_RTC: Tensor, grid: Grid, num_heads: int, **given: Tensor) -> Tensor:
            q, k, v = split_heads(qkv_RTC, 3, num_heads)
            if self.transforms:
                q, k, v = self.transforms[direction](q, k, v, grid, grid)
            o = self.cores[direction](q, k, v, grid, grid, **given)
            return merge_heads(o + self.values[direction](v, grid, grid) if self.values else o)

        return compute

    def _context(self, core: Core, x_BNC: Tensor, grid: Grid, size: tuple[int, int]) -> dict[str, Tensor]:
        """What a core reads from its half of the channels, for every stripe: the whole map decides it."""
        if not core.reads_tokens:
            return {}
        stripes = windows.padded(grid.height, size[0]) // size[0] * windows.padded(grid.width, size[1]) // size[1]
        return {key: value.repeat_interleave(stripes, 0) for key, value in core.context(x_BNC).items()}


def spread(weights: Tensor, grid: Grid, window: Grid) -> Tensor:
    """Weights (B·R, M, T, T) in the windows of a map → (B, M, N, N) on the map, 0 between windows."""
    number = torch.arange(1, grid.cells + 1, device=weights.device).view(1, -1, 1)
    cells_RT = windows.split(number, *grid[:2], window[:2]).squeeze(-1)  # 0: what completes the map
    of_images = weights.unflatten(0, (-1, len(cells_RT))).transpose(1, 2)
    whole = weights.new_zeros(*of_images.shape[:2], grid.cells + 1, grid.cells + 1)
    whole[:, :, cells_RT[:, :, None], cells_RT[:, None, :]] = of_images
    return whole[:, :, 1:, 1:]
