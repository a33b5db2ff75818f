"""The attention contract: what a mechanism is given, what it returns, and what may be asked of it.

A backbone describes each place where tokens are mixed with a `Site`; a factory makes a `Mixer` of it, called as
`mixer(x, grid)`. All that is optional about a mixer has a default here, and nothing about it changes once it is built.

Shapes: B = batch, N = prefix + H·W tokens in row-major order, C = channels, M = heads, D = channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.layers.grid import Grid as Grid

BACKENDS = ("auto", "triton", "torch")
KINDS = frozenset({"vit", "hierarchical", "convnet", "hybrid"})


class Site(NamedTuple):
    """One place in a backbone where a mixer goes; the backbone fills it in."""

    dim: int  # C
    num_heads: int  # M
    grid: Grid  # at the training resolution; a forward pass may bring another one
    stage: int  # 0-based
    block: int  # 0-based within the stage
    depth: int  # blocks in the stage
    kind: str  # one of KINDS
    positioned: bool = False  # whether the blocks of the backbone encode positions by convolution themselves
    head_dim: int | None = None  # D where it is not C / M: the inner width M·D then differs from C
    measured_in: tuple[int, int] | None = None  # the map whose distances position biases measure; None: `grid`
    image_size: tuple[int, int] | None = None  # pixels that the backbone is built for; None: it is given no images
    stride: int = 1  # of the map behind this place against `grid`; what is no `Mixer.strided` is pooled behind it
    context: int = 0  # channels of a second stream at this place, which one with `Mixer.reads_context` is given


class Mixed(NamedTuple):
    """What a mixer returns."""

    x: Tensor  # (B, N, C), as the input
    losses: dict[str, Tensor]  # scalar auxiliary losses with gradient, by name; {} when there are none
    carry: Any = None  # for the mixer of the next block, of one with `carries`: a tensor, or a tuple or dict of tensors


@dataclass(frozen=True)
class Accepts:
    """What a mixer can take.

    prefix: whether class tokens in front of the map take part ("attended") or cannot be handled ("refused").
    kinds: the kinds of backbone it makes sense in.
    gates: whether `forward(x, grid, gates)` multiplies its heads by per-token gates (B, N, M), as MoH needs.
    without_gates: why it does not, for people.
    """

    prefix: str = "attended"
    kinds: frozenset[str] = KINDS
    gates: bool = True
    without_gates: str = ""


class TokenWeights(NamedTuple):
    """Weights of every token of a map on every key, whoever may see whom.

    weights: (B, M, N, S); 0 where a token does not see a key. grid: of the N tokens. kv_grid: of the S keys, another
    map where keys are shortened. cells: of every row and every column of keys, which share of it each of the tokens'
    has, (rows of keys, rows) and (columns of keys, columns); None: they are equal pieces of the map.
    """

    weights: Tensor
    grid: Grid
    kv_grid: Grid
    cells: tuple[Tensor, Tensor] | None = None

    def on_tokens(self) -> Tensor:
        """(B, M, N, N): the weight of a key that stands for several tokens is divided evenly among these."""
        if self.kv_grid == self.grid:
            return self.weights
        sides = zip(self.grid[:2], self.kv_grid[:2], strict=True)
        rows, columns = self.cells or (shares(whole, part, self.weights) for whole, part in sides)
        cells = self.weights[..., self.kv_grid.prefix :].unflatten(-1, self.kv_grid[:2])
        rows, columns = rows.to(cells), columns.to(cells)
        spread = torch.einsum("...hw,hy,wx->...yx", cells, rows, columns).flatten(-2)
        return torch.cat([self.weights[..., : self.kv_grid.prefix], spread], dim=-1)


def shares(whole: int, part: int, like: Tensor) -> Tensor:
    """(part, whole): of each of `part` equal pieces of a line, which share of it lies in each of `whole` cells."""
    edges = torch.arange(whole + 1, device=like.device, dtype=like.dtype) / whole
    cuts = torch.arange(part + 1, device=like.device, dtype=like.dtype) / part
    first, last = torch.maximum(cuts[:-1, None], edges[:-1]), torch.minimum(cuts[1:, None], edges[1:])
    return (last - first).clamp_min(0) * part


class Runs(NamedTuple):
    """How a mixer computes on a GPU: by one of our Triton kernels, or in PyTorch.

    operation: the module of `kernels`, or what PyTorch calls it.
    fused: whether it is a Triton kernel.
    reason: why it is not, where a user may ask.
    """

    operation: str
    fused: bool
    reason: str = ""


class Refused(UserError):
    """Raised by a mechanism for a site that it cannot serve: the reason, and the setting that mends it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason, self.fix = reason, fix


class Mixer(nn.Module):
    """A mixer of tokens: output and input have the same shape, for any grid and batch size.

    Called as `mixer(x_BNC, grid, gates_BNM=None) -> Mixed`; one whose `reads_stream` is true also takes `stream_BNC`,
    one whose `carries` is true also `carry`.

    Args:
        site: the place that it is built for, kept as `site`.
        backend: "auto" (a Triton kernel where there is one for a GPU, else PyTorch), "triton" (refused where it would
            not be the kernel) or "torch"; the results agree to rounding.

    Attributes:
        accepts: what it can take.
        reads_stream: whether it is also given the input of the block before its norm, as `stream_BNC`.
        reads_context: whether, at a site with a `context`, its `stream_BNC` is (B, N, C + context): both streams side
            by side.
        prenorm: whether a backbone whose blocks have no norm for all mixers gives it normalised tokens.
        residual: whether a ConvNeXt has a residual around it, as a transformer has.
        has_queries: whether `queries` gives the queries of every token, as a router may need.
        carries: whether it is given, as `carry`, what the mixer of the block before it returned in `Mixed.carry`: None
            in the first block of a stage, or of the model if `carries_across_stages`.
        has_matrix: whether `attention_matrix` is there, and with it `attend`, `token_weights` and `over_tokens`.
        without_matrix: why it is not, for people.
        row_stochastic: whether its rows sum to one, on maps that nothing completes to whole windows.
        adds: whether it gives more than `attend`, such as a convolution beside weights times values.
        ignores_grid: whether its result depends on the tokens alone, however they are laid out.
        strided: whether it gives the smaller map itself, at a site with a `stride`.
        closes_keys: whether it also takes `open_BN`, (B, H·W): which cells of the map may be seen, bool, or shares in
            0 … 1 whose logarithms are added to the logits; tokens in front of the map always are.
    """

    accepts = Accepts()
    reads_stream = False
    reads_context = False
    prenorm = True
    residual = True
    has_queries = False
    carries = False
    carries_across_stages = False
    has_matrix = False
    without_matrix = ""
    row_stochastic = False
    adds = False
    ignores_grid = False
    strided = False
    closes_keys = False

    def __init__(self, site: Site, backend: str = "auto") -> None:
        super().__init__()
        self.site, self.backend = site, backend

    def runs(self, gated: bool = False) -> Runs:
        """How it computes on a GPU when `backend` is "auto", with or without gates of heads."""
        return Runs(type(self).__name__, False, "it is written in PyTorch")

    def queries(self, x_BNC: Tensor) -> Tensor:
        """Queries (B, M, N, D) of the tokens, whatever tokens they see.

        Raises:
            TypeError: it has none, see `has_queries`.
        """
        raise TypeError(f"queries: {type(self).__name__} has no queries of each token")

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Weights (B, M, N, S) of every query on every key.

        Raises:
            TypeError: it has no matrix.
        """
        raise TypeError(no_matrix(type(self).__name__, self.without_matrix))

    def attend(self, weights: Tensor, x_BNC: Tensor, grid: Grid) -> Tensor:
        """What the mixer gives if its weights, as from `attention_matrix`, are these: (B, N, C).

        What it adds to weights times values is left out, see `adds`.

        Raises:
            TypeError: it has no matrix.
        """
        raise TypeError(no_matrix(type(self).__name__, self.without_matrix))

    def token_weights(self, x_BNC: Tensor, grid: Grid, **named: Any) -> TokenWeights:
        """What `attention_matrix` gives, of all tokens on all keys of the map, whatever groups they attend in.

        One with `carries` also takes `carry` here and there.

        Raises:
            TypeError: it has no matrix.
        """
        return self.over_tokens(self.attention_matrix(x_BNC, grid, **named), x_BNC, grid)

    def over_tokens(self, matrix: Tensor, x_BNC: Tensor, grid: Grid) -> TokenWeights:
        """A matrix such as `attention_matrix` gives, or a gradient of it, of all tokens on all keys: linear in it."""
        return TokenWeights(matrix, grid, grid)


def no_matrix(who: str, why: str) -> str:
    """The sentence with which something refuses to give its attention matrix."""
    return f"attention_matrix: {who} has no attention matrix" + (f": {why}" if why else "")


AttentionFactory = Callable[[Site], Mixer]
