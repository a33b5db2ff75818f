"""Cross-shaped windows: half of the heads attends in vertical stripes of the map, the other half in horizontal ones.

Source: CSWin Transformer, Dong et al., CVPR 2022, arXiv:2107.00652, section 3.2 and equation 7 (locally-enhanced
position encoding, LePE: a depth-wise convolution of the values of each stripe).
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
from models.attention import Accepts, Grid, Mixed, Mixer, Refused, Runs, Site
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.options import check_flags, ratio_of, stripe_of, window_of
from models.attention.multihead import Core, MultiHead, reduction
from models.attention.softmax import SoftmaxCore

MakeCore = Callable[[int, Grid, Grid], Core]  # heads, map of the queries, map of the keys


def cswin_attention(
    site: Site,
    *,
    stripe: int | str | Sequence[int | str] = (1, 2, 7, "all"),
    lepe: bool = True,
    qkv_bias: bool = True,
    backend: str = "auto",
) -> Mixer:
    """Softmax attention in cross-shaped windows, with LePE.

    Args:
        site: the place in the backbone.
        stripe: width of the stripes in tokens, one number or one per stage, cut to the map; "all" for the whole map
            without stripes. Paper: 1, 2, 7, all (12 for 7 at 384 px). A plain ViT takes the third.
        lepe: add a 3×3 depth-wise convolution of the values of each stripe.
        qkv_bias: bias of the projection.
        backend: "auto", "triton" or "torch"; the attention is PyTorch's own fused kernel in any case.
    """
    check_flags("cswin", lepe=lepe, qkv_bias=qkv_bias)
    dim = head_channels(site)
    options = {"qkv_bias": qkv_bias, "backend": backend}
    return lay_out(site, lambda heads, *_: SoftmaxCore(heads, dim, lepe=lepe), stripe=stripe, **options)


def lay_out(
    site: Site,
    core: MakeCore,
    *,
    window: int | Sequence[int] | None = None,
    stripe: int | str | Sequence[int | str] | None = None,
    sr_ratio: int | Sequence[int] = 1,
    kv_pool: int | None = None,
    qkv_bias: bool = True,
    backend: str = "auto",
) -> Mixer:
    """Who may see whom: the cores of a mechanism on the whole map, in windows, in stripes, or with fewer keys.

    Args:
        site: the place in the backbone.
        core: called with heads, the map of the queries and that of the keys, as a core sees them.
        window: sides of windows; None for the whole map.
        stripe: width of stripes, see `cswin_attention`; None or "all" for none.
        sr_ratio, kv_pool: what shortens the keys, see `reduction`.

    Raises:
        Refused: two of these at once, or stripes with an odd number of heads.
    """
    size, width, ratio = window_of(window, site.grid), stripe_of(stripe, site), ratio_of(site, sr_ratio, kv_pool)
    if sum((size is not None, width is not None, ratio != 1 or kv_pool is not None)) > 1:
        raise Refused(
            "window, stripe and shortened keys exclude each other", "set all but one of these options to null (or 1)"
        )
    if width is not None:
        return CrossShaped(site, core, width, qkv_bias=qkv_bias, backend=backend)
    reduce = reduction(site, ratio, kv_pool)
    grid = site.grid if size is None else Grid(*size)
    made = core(site.num_heads, grid, reduce.reduced(grid) if reduce else grid)
    return MultiHead(site, made, window=size, reduce=reduce, qkv_bias=qkv_bias, backend=backend)


class CrossShaped(Mixer):
    """Projection, two cores in stripes, projection.

    Args:
        site: the place in the backbone; the map has no prefix tokens.
        core: makes a core, see `lay_out`; called once for each direction, with half of the heads.
        stripe: width of the stripes in tokens, cut to the map.
        qkv_bias: bias of the projection.
        backend: "auto", "triton" or "torch".
    """

    accepts = Accepts(prefix="refused")

    def __init__(
        self, site: Site, core: MakeCore, stripe: int, *, qkv_bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__(site, backend)
        if site.num_heads % 2:
            raise Refused(
                f"stripes in two directions share the heads, and {site.num_heads} is odd",
                "set attention.stripe=all, or an even model.num_heads",
            )
        self.stripe = stripe
        self.num_heads, self.head_dim = site.num_heads // 2, head_channels(site, even=True)  # of one direction
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)
        grids = [Grid(*size) for size in self.sizes(site.grid)]
        self.cores: Sequence[Core] = nn.ModuleList(core(self.num_heads, grid, grid) for grid in grids)
        self.reads_stream = self.cores[0].reads_stream

    def sizes(self, grid: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of a vertical and of a horizontal stripe."""
        height, width = grid[:2]
        return (height, min(self.stripe, width)), (min(self.stripe, height), width)

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`; the gates are applied behind the heads."""
        if self.head_dim > WIDEST_HEAD:
            return Runs(type(self.cores[0]).__name__, False, f"heads wider than {WIDEST_HEAD} channels have no kernel")
        return self.cores[0].runs(None, False)

    def forward(
        self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None, stream_BNC: Tensor | None = None
    ) -> Mixed:
        runs = self.runs()
        fused = runs.fused and is_fused(runs.operation, self.backend, x_BNC)
        sources = (stream_BNC if self.reads_stream else x_BNC).chunk(2, dim=-1)
        mixed = []
        for core, size, half, source in zip(self.cores, self.sizes(grid), self._projections(), sources, strict=True):
            given = self._context(core, source, grid, size)
            qkv_RTC = windows.split(F.linear(x_BNC, *half), *grid[:2], size)
            compute = core.fused if fused else self._in_pytorch(core)
            mixed.append(windows.merge(compute(qkv_RTC, Grid(*size), self.num_heads, **given), *grid[:2], size))
        return Mixed(self.proj(gated_heads(torch.cat(mixed, dim=-1), gates_BNM)), {})

    def _projections(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of queries, keys and values of each direction: what they give need not be copied apart."""
        bias = self.qkv.bias
        for half in range(2):
            weight = self.qkv.weight.unflatten(0, (3, 2, -1))[:, half].flatten(0, 1)
            yield weight, None if bias is None else bias.unflatten(0, (3, 2, -1))[:, half].flatten(0, 1)

    def _in_pytorch(self, core: Core) -> Callable[..., Tensor]:
        def compute(qkv_RTC: Tensor, grid: Grid, num_heads: int, **given: Tensor) -> Tensor:
            return merge_heads(core(*split_heads(qkv_RTC, 3, num_heads), grid, grid, **given))

        return compute

    def _context(self, core: Core, x_BNC: Tensor, grid: Grid, size: tuple[int, int]) -> dict[str, Tensor]:
        """What a core reads from its half of the channels, for every stripe: the whole map decides it."""
        if not core.reads_tokens:
            return {}
        stripes = windows.padded(grid.height, size[0]) // size[0] * windows.padded(grid.width, size[1]) // size[1]
        return {key: value.repeat_interleave(stripes, 0) for key, value in core.context(x_BNC).items()}
