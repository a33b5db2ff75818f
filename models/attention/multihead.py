"""Multi-head token mixing: projection → layout → core → head gate → projection.

The layout decides who may see whom; the core computes the heads; gates, when given, weight every head of every token
before the output projection. Parts change single steps: `pre` the tokens, `transform` queries, keys and values, `value`
what is added to the heads.

Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head, S = keys; W = B·groups and T = tokens in
a group take the places of B and N inside a layout with groups.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import WIDEST_HEAD, is_fused
from kernels.heads import gated
from models.attention import flex
from models.attention.contract import Accepts, Grid, Mixed, Mixer, Refused, Runs, Site, TokenWeights, no_matrix
from models.attention.contract.explaining import is_explaining, note
from models.attention.contract.heads import gated_heads, head_channels, merge_heads, split_heads
from models.attention.contract.layout import KEYS, SAME, SCATTERED, SURROUNDING, Groups, Layout
from models.layers.resizable import Resizable


class Core(nn.Module):
    """Computes the heads of one group of tokens: `core(q_BMND, k_BMSD, v_BMSD, grid, kv_grid) -> o_BMND`.

    `grid` and `kv_grid` are the maps of the queries and of the keys and values, equal unless the layout says otherwise.
    One that `masks` also takes `mask`, (R, T, S), or (B·R, M, T, S) where images and heads differ: bool and True where
    a pair may attend, or numbers that are added to the logits. One with `places` also takes `offsets`, (T, S, 2) or
    (R, T, S, 2): how far, in rows and columns, each query lies behind each key, where the two maps do not tell.

    One whose `runs` is fused has `fused(qkv_BNC, grid, num_heads, ...) -> o_BNC`, which computes the same from the
    packed projection (B, N, 3·M·D). Where its kernel finds the windows by itself, that also takes `window`, `shift` and
    the `padding` that completes the map; where it finds neighbourhoods, `around`; where it weights the heads, `gates`.

    One that is `flexible` has a `bias` of offsets, or None, and `flex(q_BMND, k_BMSD, v_BMSD, grid, around) -> o_BMND`,
    which computes the same with PyTorch's FlexAttention on the map, in the neighbourhoods `around` or without.

    Attributes:
        keys: what its keys may be beside its queries, see `models.attention.contract.layout`.
        masks, places: see above.
        finds_windows: whether the kernel finds the windows of a map.
        finds_neighbors: whether a kernel finds neighbourhoods on it.
        reads_tokens: whether both ways of computing also take what `context` gives, as keywords.
        reads_stream: whether that is read from the input of the block, before its norm, instead of that of the layer.
        adds: whether it gives more than `finished(matrix @ valued(v))`, such as a convolution.
        row_stochastic: whether the rows of the matrix sum to one.
        without_matrix: why there is none, for people.
        ignores_grid: whether the two maps do not matter.
    """

    keys = KEYS
    masks = False
    places = False
    finds_windows = False
    finds_neighbors = False
    reads_tokens = False
    reads_stream = False
    adds = False
    row_stochastic = False
    without_matrix = ""
    ignores_grid = False
    flexible = False

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """The kernel that computes the heads in such windows, gated or not."""
        return Runs(type(self).__name__, False, "it is written in PyTorch")

    def context(self, x_BNC: Tensor) -> dict[str, Tensor]:
        """What it reads from the tokens of each sequence besides queries, keys and values."""
        return {}

    @property
    def has_matrix(self) -> bool:
        """Whether `matrix` is there."""
        return type(self).matrix is not Core.matrix

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S) of every query on every key; with `mask` and `offsets` as it is called.

        Raises:
            TypeError: it has none.
        """
        raise TypeError(no_matrix(type(self).__name__, self.without_matrix))

    def valued(self, v_BMSD: Tensor, kv_grid: Grid) -> Tensor:
        """What its weights are multiplied with: the values, unless a core says otherwise."""
        return v_BMSD

    def finished(self, o_BMND: Tensor) -> Tensor:
        """What it makes of that product: nothing more, unless a core says otherwise."""
        return o_BMND


class MultiHead(Resizable, Mixer):
    """Projection → layout → core → gate → projection.

    Args:
        site: the place in the backbone.
        core: computes the heads; see `Core`.
        layout: who may see whom; None for the whole map.
        pre: `(x_BNC, grid) -> x_BNC` in front of the projection; None for none.
        transform: `(q, k, v, grid, kv_grid) -> (q, k, v)` behind it.
        value: `(v_BMSD, kv_grid, grid) -> o_BMND`, added to the heads.
        qkv_bias: whether queries, keys and values have a bias.
        output_projection: whether the heads are projected to C channels; without it M·D must be C.
        head_dim: channels per head D; None for C / M.
        accepts: what it can take, where that is not what the layout can: class tokens on the whole map alone.
        backend: "auto", "triton" or "torch"; see `models.attention.Mixer`.

    Raises:
        Refused: the core cannot work in the layout, or heads that are not projected do not make up C channels.
    """

    has_queries = True

    def __init__(
        self,
        site: Site,
        core: Core,
        *,
        layout: Layout | None = None,
        pre: nn.Module | None = None,
        transform: nn.Module | None = None,
        value: nn.Module | None = None,
        qkv_bias: bool = True,
        output_projection: bool = True,
        head_dim: int | None = None,
        accepts: Accepts | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(site, backend)
        self.layout = Layout() if layout is None else layout
        check_layout(self.layout, core)
        check_transform(transform, self.layout, core, value)
        self.num_heads, self.head_dim = site.num_heads, head_dim or head_channels(site)
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(site.dim, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, site.dim) if output_projection else unprojected(inner, site.dim)
        self.pre, self.transform, self.core, self.value = pre, transform, core, value
        self.reduce, self.content = self.layout.reduce, self.layout.content
        self.strided = self.layout.stride > 1
        self.reads_stream, self.has_matrix = core.reads_stream, core.has_matrix and not self.strided
        self.without_matrix = "it has fewer queries than tokens" if self.strided else core.without_matrix
        self.row_stochastic = core.row_stochastic and self.layout.whole_rows
        self.adds = core.adds
        self.accepts = accepts or Accepts(prefix="attended" if self.layout.takes_prefix else "refused")
        self.grid, self.usual_mask = site.grid, True
        stored = getattr(self.layout, "stored_mask", False)
        self.register_buffer("shift_mask", self._usual_mask(torch.get_default_device()) if stored else None)

    @property
    def ignores_grid(self) -> bool:
        """Whether it is a core for which maps do not matter, on all tokens, with parts of that kind alone."""
        parts = [part for part in (self.pre, self.transform, self.value) if part is not None]
        return type(self.layout) is Layout and all(getattr(p, "ignores_grid", False) for p in (self.core, *parts))

    @property
    def window(self) -> tuple[int, int] | None:
        """Sides of its windows; None for none."""
        return self.layout.window

    @property
    def shift(self) -> tuple[int, int]:
        """How far they are rolled."""
        return self.layout.shift

    def runs(self, gated: bool = False) -> Runs:
        """See `models.attention.Mixer`."""
        if self._finds_neighbors():
            return Runs("neighborhood_attention", True)
        if self.backend != "torch" and (reason := self._flex()) is not None:
            return Runs(flex.WHO, False, reason)
        window = self.layout.window_on(self.grid)
        runs = self.core.runs(window, gated)
        if (reason := self._unfused()) is None:
            return runs
        return Runs(type(self.core).__name__ if runs.fused else runs.operation, False, reason)

    def _finds_neighbors(self) -> bool:
        """Whether a kernel computes the heads in the neighbourhoods of the layout."""
        alone = self.transform is None and self.value is None and self.head_dim <= WIDEST_HEAD
        return self.layout.around is not None and self.core.finds_neighbors and alone

    def _flex(self) -> str | None:
        """What FlexAttention computes here; None where it does not."""
        if not self.core.flexible or self.head_dim < flex.NARROWEST_HEAD:
            return None
        if self.core.bias is not None and torch.are_deterministic_algorithms_enabled():
            return None  # the gradient of its table is summed in no fixed order
        if self.layout.around is not None:
            return "neighbourhoods are a mask of blocks"
        biased = type(self.layout) is Layout and self.core.bias is not None
        return f"{type(self.core.bias).__name__} is a table of offsets" if biased else None

    def _unfused(self) -> str | None:
        """Why no kernel can compute it, whatever the core; None where nothing is against it."""
        if self.reduce is not None:
            return "its keys come from a map of another size than its queries"
        if self.layout.keys != SAME:
            return "its keys are gathered for every group of queries"
        if self.grid.prefix and self.core.finds_windows and self.layout.window_on(self.grid) is not None:
            return "class tokens stand in every window"
        if self.layout.masks and not self.core.finds_windows:
            return "its windows are masked"
        if self.content is not None:
            return "what tokens hold decides which see each other"
        if self.head_dim > WIDEST_HEAD:
            return f"heads wider than {WIDEST_HEAD} channels have no kernel"
        if not self.usual_mask:
            return "its file brought a mask of shifted windows of its own"
        if self.transform is not None:
            return f"queries and keys are changed behind the projection ({type(self.transform).__name__})"
        return None if self.value is None else f"something is added to the heads ({type(self.value).__name__})"

    def resized(self, name: str, value: Tensor) -> Tensor:
        """A stored mask for a map of another size becomes the one for the map of the site; the rest stays as it is."""
        return self._usual_mask(value.device) if name == "shift_mask" else value

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.shift_mask is not None and not self.shift_mask.is_meta:
            self.usual_mask = torch.equal(self.shift_mask, self._usual_mask(self.shift_mask.device))

    def _usual_mask(self, device: torch.device) -> Tensor:
        """(R, T, T): 0 where a pair may attend and -100 where not, as in the files of Swin."""
        return torch.where(self.layout.mask(self.grid, device), 0.0, -100.0)

    @property
    def closes_keys(self) -> bool:
        """Whether keys can be closed, image by image: on all tokens, with a core that takes a mask."""
        drops = getattr(self.transform, "drops_keys", False)
        return type(self.layout) is Layout and self.core.masks and not drops

    def forward(
        self,
        x_BNC: Tensor,
        grid: Grid,
        gates_BNM: Tensor | None = None,
        stream_BNC: Tensor | None = None,
        open_BN: Tensor | None = None,
    ) -> Mixed:
        x_BNC = x_BNC if self.pre is None else self.pre(x_BNC, grid)
        runs = self.runs(gated=self._gates_heads(gates_BNM))
        written = (is_explaining() and self.has_matrix) or open_BN is not None
        if runs.fused and not written and is_fused(runs.operation, self.backend, x_BNC):
            return Mixed(self._forward_fused(x_BNC, grid, gates_BNM, stream_BNC), {})
        if runs.operation == flex.WHO and not written and x_BNC.is_cuda and is_fused(flex.WHO, self.backend, x_BNC):
            return Mixed(self._forward_flex(x_BNC, grid, gates_BNM), {})
        groups, v, kv_grid = self._groups(x_BNC, grid)
        if open_BN is not None:
            groups.given["mask"] = open_keys(open_BN, grid)
        given = groups.given | self._context(x_BNC, stream_BNC, grid)
        compute = self._explained if is_explaining() and self.has_matrix else self.core
        o_WMTD = compute(groups.q, groups.k, groups.v, groups.grid, groups.kv_grid, **given)
        return Mixed(self._finish(groups.back(o_WMTD), v, grid, kv_grid, gates_BNM), groups.losses)

    def _gates_heads(self, gates_BNM: Tensor | None) -> bool:
        """Whether there is one gate per head, which kernels take; one per channel of a head comes behind them."""
        return gates_BNM is not None and gates_BNM.shape[-1] == self.num_heads

    def _forward_flex(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None) -> Tensor:
        """The same on the map, without gathering keys or writing out a bias."""
        between = self.layout.between(grid)
        q, k, v, kv_grid = self._heads(self.layout.split(x_BNC, grid), between)
        o_BMND = self.core.flex(q, k, v, between, self.layout.around)
        return self._finish(o_BMND, v, grid, kv_grid, gates_BNM)

    def _groups(self, x_BNC: Tensor, grid: Grid) -> tuple[Groups, Tensor, Grid]:
        """Heads of the groups; and the values of all tokens (W, M, S, D) with their map."""
        x, between = self.layout.split(x_BNC, grid), self.layout.between(grid)
        q, k, v, kv_grid = self._heads(x, between)
        groups = self.layout.gather(q, k, v, between, kv_grid, self.content)
        if not self.core.places:
            groups.given.pop("offsets", None)
        if (mask := self._mask(grid, x.device)) is not None:
            groups.given["mask"] = mask
        return groups, v, kv_grid

    def _heads(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Grid]:
        """Queries, keys and values of what `split` gave, and the map of the keys."""
        q, k, v, kv_grid = self._project(x, grid)
        if self.transform is not None:
            q, k, v = self.transform(q, k, v, grid, kv_grid)
        return q, k, v, kv_grid

    def _finish(self, o_WMTD: Tensor, v: Tensor, grid: Grid, kv_grid: Grid, gates_BNM: Tensor | None) -> Tensor:
        """Heads (W, M, T, D) of what `split` gave → (B, N, C): what is added, gates, projection, the map."""
        if self.value is not None:
            o_WMTD = o_WMTD + self.value(v, kv_grid, self.layout.between(grid))
        if gates_BNM is not None:
            o_WMTD = gated(o_WMTD, self.layout.split(gates_BNM, grid))
        return self.layout.merge(self.proj(merge_heads(o_WMTD)), grid)

    def _forward_fused(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None, stream_BNC: Tensor | None) -> Tensor:
        """The same from the packed projection: queries, keys and values are never separated or copied."""
        window = self.layout.window_on(grid)
        if window is not None and self.core.finds_windows:
            x, arranged = self.layout.arrange(x_BNC, grid)
            windows = {"window": window, "shift": self.shift, "padding": self.qkv.bias}
            o_BNC = self.layout.restore(self.core.fused(self.qkv(x), arranged, self.num_heads, **windows), grid)
            return self.proj(gated_heads(o_BNC, gates_BNM))
        if (around := self.layout.around) is not None:
            local, given = self.layout.between(grid), {"around": around}
        elif self._gates_heads(gates_BNM) and self.core.runs(window, gated=True).operation == "moh_attention":
            return self.proj(self.core.fused(self.qkv(x_BNC), grid, self.num_heads, gates=gates_BNM))
        else:
            local, given = self.layout.local(grid), self._context(x_BNC, stream_BNC, grid)
        o_BNC = self.core.fused(self.qkv(self.layout.split(x_BNC, grid)), local, self.num_heads, **given)
        gates = None if gates_BNM is None else self.layout.split(gates_BNM, grid)
        return self.layout.merge(self.proj(gated_heads(o_BNC, gates)), grid)

    def queries(self, x_BNC: Tensor) -> Tensor:
        """Queries (B, M, N, D) of the tokens, whatever windows they see."""
        inner = self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[:inner]
        return split_heads(F.linear(x_BNC, self.qkv.weight[:inner], bias), 1, self.num_heads)[0]

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, M, N, S) of every query on every key; of each group, (B·R, M, T, S), in a layout with groups.

        Raises:
            TypeError: the core has no matrix, or there are fewer queries than tokens.
        """
        if self.strided:
            return super().attention_matrix(x_BNC, grid)
        x_BNC = x_BNC if self.pre is None else self.pre(x_BNC, grid)
        groups, _, _ = self._groups(x_BNC, grid)
        return self.core.matrix(groups.q, groups.k, groups.grid, groups.kv_grid, **groups.given)

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """See `models.attention.Mixer`; what a value part adds is not left out."""
        x_BNC = x_BNC if self.pre is None else self.pre(x_BNC, grid)
        groups, v, kv_grid = self._groups(x_BNC, grid)
        return self._finish(groups.back(self._read(weights, groups.v, groups.kv_grid)), v, grid, kv_grid, None)

    def over_tokens(self, matrix: Tensor, x_BNC: Tensor, grid: Grid) -> TokenWeights:
        """See `models.attention.Mixer`: what the mixer does with values of one for each token in turn."""
        x_BNC = x_BNC if self.pre is None else self.pre(x_BNC, grid)
        if self.reduce is not None:
            return TokenWeights(matrix, grid, self.reduce.reduced(grid), self.reduce.cells(grid))
        N, D = grid.tokens, self.head_dim
        if type(self.layout) is Layout and matrix.shape[-1] == N:
            return TokenWeights(matrix, grid, grid)
        each = F.pad(torch.eye(N, dtype=matrix.dtype, device=matrix.device), (0, -N % D))
        none = self._passed_on(matrix, x_BNC, grid, matrix.new_zeros(N, D))  # what keys that are no tokens give
        found = [self._passed_on(matrix, x_BNC, grid, columns) - none for columns in each.split(D, dim=1)]
        return TokenWeights(torch.cat(found, dim=-1)[..., :N], grid, grid)

    def _passed_on(self, matrix: Tensor, x_BNC: Tensor, grid: Grid, v_ND: Tensor) -> Tensor:
        """What all tokens get, (B, M, N, D), of these values, the same in all heads; what completes the map has 0."""
        B, M, between = len(x_BNC), self.num_heads, self.layout.between(grid)
        v = self.layout.split(v_ND.expand(B, -1, -1), grid)[:, None].expand(-1, M, -1, -1)
        q, k, _, kv_grid = self._project(self.layout.split(x_BNC, grid), between)
        if self.transform is not None:
            q, k, seen = self.transform(q, k, v, between, kv_grid)
            v = seen if getattr(self.transform, "drops_keys", False) else v
        groups = self.layout.gather(q, k, v, between, kv_grid, self.content)
        return self.put_back(matrix @ groups.v, groups, grid)

    def groups(self, x_BNC: Tensor, grid: Grid) -> Groups:
        """Heads of the groups in which the tokens attend, as its core sees them."""
        return self._groups(x_BNC if self.pre is None else self.pre(x_BNC, grid), grid)[0]

    def put_back(self, o_WMTE: Tensor, groups: Groups, grid: Grid) -> Tensor:
        """What the queries of `groups` have, any number of each head, as that of all tokens (B, M, N, E)."""
        o_WNE = groups.back(o_WMTE).transpose(1, 2).flatten(2)
        return self.layout.merge(o_WNE, grid).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _explained(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, kv_grid: Grid, **given: Any) -> Tensor:
        """As the core computes, by way of the matrix, which is noted."""
        placed = {name: value for name, value in given.items() if name in ("mask", "offsets")}
        matrix = note(self, self.core.matrix(q, k, grid, kv_grid, **placed))
        o_BMND = self._read(matrix, v, kv_grid)
        if not self.core.adds:
            return o_BMND
        added = self.core(q.detach(), k.detach(), v, grid, kv_grid, **given) - self._read(matrix.detach(), v, kv_grid)
        return o_BMND + added

    def _read(self, matrix: Tensor, v: Tensor, kv_grid: Grid) -> Tensor:
        """The heads of a group that these weights give."""
        valued = self.core.valued(v, kv_grid)
        return self.core.finished(matrix.to(valued.dtype) @ valued).to(v.dtype)

    def _context(self, x_BNC: Tensor, stream_BNC: Tensor | None, grid: Grid) -> dict[str, Tensor]:
        """What the core reads from the tokens: of the layer, or of the block where it reads the stream."""
        if not self.core.reads_tokens:
            return {}
        return self.core.context(self.layout.split(stream_BNC if self.reads_stream else x_BNC, grid))

    def _mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        if self.shift_mask is not None and grid[:2] == self.grid[:2]:
            return self.shift_mask
        return self.layout.mask(grid, device) if self.layout.masks else None

    def _project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Grid]:
        """Queries (B, M, N, D), keys and values (B, M, S, D), and the map of the keys."""
        if self.reduce is None and not self.strided:
            q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
            return q, k, v, grid
        inner = self.num_heads * self.head_dim
        reduced, kv_grid = (x, grid) if self.reduce is None else self.reduce(x, grid)
        bias = None if self.qkv.bias is None else self.qkv.bias[inner:]
        k, v = split_heads(F.linear(reduced, self.qkv.weight[inner:], bias), 2, self.num_heads)
        return self.queries(self.layout.asking(x, grid)), k, v, kv_grid


def open_keys(open_BS: Tensor, grid: Grid) -> Tensor:
    """(B, 1, 1, N): which keys may be seen by all queries, or what is added to their logits; the prefix is open."""
    always = open_BS.new_ones(open_BS.shape[0], grid.prefix)
    keys_B11N = torch.cat([always, open_BS], dim=1)[:, None, None]
    return keys_B11N if open_BS.dtype == torch.bool else (keys_B11N + 1e-10).log()


def unprojected(inner: int, dim: int) -> nn.Identity:
    """In the place of the output projection; refused where the heads do not make up the channels of the tokens."""
    if inner != dim:
        raise Refused(
            f"without an output projection the {inner} channels of the heads are not the {dim} of the tokens",
            "set attention.output_projection=true",
        )
    return nn.Identity()


def check_layout(layout: Layout, core: Core) -> None:
    """Refuses a core that cannot work in a layout."""
    who, where = type(core).__name__, type(layout).__name__
    if layout.keys not in core.keys:
        what = "tokens without a map" if layout.keys == SCATTERED else f"keys that are not its queries ({layout.keys})"
        raise Refused(f"{who} cannot work on {what}, as in {where}", "choose another attention/layout, e.g. window")
    if layout.masks and not core.masks:
        raise Refused(f"{who} takes no mask, which {where} needs", "choose a layout without one, e.g. window unshifted")


def check_transform(transform: nn.Module | None, layout: Layout, core: Core, value: nn.Module | None) -> None:
    """Refuses a transform that drops keys where somebody needs to know the place of each."""
    if not getattr(transform, "drops_keys", False):
        return
    gathers = layout.keys in (SURROUNDING, SCATTERED) or layout.content is not None
    wanting = {layout: layout.masks or gathers, core: SCATTERED not in core.keys, value: value is not None}
    for part, wants in wanting.items():
        if wants:
            raise Refused(
                f"{type(transform).__name__} drops keys, and {type(part).__name__} needs all of them on their map",
                "leave out attention/transform=random_keys, or bias, factor, value and a layout that masks or gathers",
            )
