"""The attention contract: what a mechanism is given, what it returns, and the check of every place before a run.

A backbone describes each place where tokens are mixed with a `Site` and hands all of them to `build`, together with the
factory (or one factory per stage) that the configuration chose. What comes back is one `Mixer` per site, called as
`mixer(x, grid)`; all that is optional about it has a default there, and nothing about it changes once it is built.

Shapes: B = batch, N = prefix + H·W tokens in row-major order, C = channels, M = heads, D = channels per head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from typing import Any, NamedTuple

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


class Mixed(NamedTuple):
    """What a mixer returns."""

    x: Tensor  # (B, N, C), as the input
    losses: dict[str, Tensor]  # scalar auxiliary losses with gradient, by name; {} when there are none


@dataclass(frozen=True)
class Accepts:
    """What a mixer can take.

    prefix: whether class tokens in front of the map take part ("attended") or cannot be handled ("refused").
    kinds: the kinds of backbone it makes sense in.
    gates: whether `forward(x, grid, gates)` multiplies its heads by per-token gates (B, N, M), as MoH needs.
    """

    prefix: str = "attended"
    kinds: frozenset[str] = KINDS
    gates: bool = True


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

    Called as `mixer(x_BNC, grid, gates_BNM=None) -> Mixed`; one whose `reads_stream` is true also takes `stream_BNC`.

    Args:
        site: the place that it is built for, kept as `site`.
        backend: "auto" (a Triton kernel where there is one for a GPU, else PyTorch), "triton" (refused where it would
            not be the kernel) or "torch"; the results agree to rounding.

    Attributes:
        accepts: what it can take.
        reads_stream: whether it is also given the input of the block before its norm, as `stream_BNC`.
        prenorm: whether a ConvNeXt gives it normalised tokens, and a residual around it, as a transformer does.
        has_queries: whether `queries` gives the queries of every token, as a router may need.
    """

    accepts = Accepts()
    reads_stream = False
    prenorm = True
    has_queries = False

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
        raise TypeError(f"attention_matrix: {type(self).__name__} has no attention matrix")


AttentionFactory = Callable[[Site], Mixer]


def build(attention: AttentionFactory | Sequence[AttentionFactory], sites: Sequence[Site]) -> list[Mixer]:
    """One mixer per site, or one error with every site where the mechanism does not fit.

    Args:
        attention: a factory for all stages, or a sequence with one factory per stage.
        sites: every place of the backbone, in order.

    Raises:
        ValueError: one line per misfit: stage, block, dim, heads, grid, the reason, and what mends it.
    """
    factories = _per_stage(attention, stages=max(site.stage for site in sites) + 1) if sites else []
    mixers, problems = [], []
    for site in sites:
        try:
            mixer = factories[site.stage](site)
            check(mixer, site)
            mixers.append(mixer)
        except Refused as refusal:
            problems.append((site, refusal))
    if problems:
        raise UserError(_report(problems, len(sites)))
    return mixers


def check(mixer: nn.Module, site: Site) -> None:
    """Raises `Refused` when what the mixer accepts does not cover the site."""
    who = type(mixer).__name__
    if not isinstance(mixer, Mixer):
        raise Refused(f"{who} is no `Mixer`, so it is not an attention mechanism", "see models/attention/__init__.py")
    if site.grid.prefix and mixer.accepts.prefix == "refused":
        raise Refused(
            f"it works on the map alone and cannot take the {site.grid.prefix} class token(s) in front of it",
            "set model.class_token=false",
        )
    runs = mixer.runs()
    if mixer.backend not in BACKENDS:
        raise Refused(f"backend={mixer.backend} is unknown", f"set attention.backend to {', '.join(BACKENDS)}")
    if mixer.backend == "triton" and not runs.fused:
        raise Refused(f"{runs.operation} has no Triton kernel: {runs.reason}", "set attention.backend=auto")
    if site.kind not in mixer.accepts.kinds:
        raise Refused(
            f"it does not work in a backbone of kind {site.kind}",
            f"choose a model of kind {' or '.join(sorted(mixer.accepts.kinds))}",
        )


def mixers_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Mixer]]:
    """The outermost mixers of a model by name: what wraps another, such as MoH, speaks for both."""
    for name, child in module.named_children():
        if isinstance(child, Mixer):
            yield f"{prefix}{name}", child
        else:
            yield from mixers_of(child, f"{prefix}{name}.")


def _per_stage(attention: AttentionFactory | Sequence[AttentionFactory], stages: int) -> list[AttentionFactory]:
    if not isinstance(attention, Sequence):
        return [attention] * stages
    if len(attention) != stages:
        raise UserError(
            f"attention: the list has {len(attention)} entries, the backbone has {stages} stages; give one per stage"
        )
    return list(attention)


def _report(problems: list[tuple[Site, Refused]], total: int) -> str:
    """One line per run of neighbouring blocks with the same shape and reason."""
    lines = [f"attention: {len(problems)} of {total} places cannot take the chosen mechanism:"]
    for (site, text), group in groupby(problems, key=lambda p: (p[0]._replace(block=0), str(p[1]))):
        blocks = [problem[0].block for problem in group]
        where = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
        height, width, prefix = site.grid
        grid = f"{height}x{width}" + (f"+{prefix}" if prefix else "")
        lines.append(
            f"  stage {site.stage} {where} (dim {site.dim}, heads {site.num_heads}, grid {grid}, {site.kind}): {text}"
        )
    return "\n".join(lines)


def __getattr__(name: str) -> Any:
    """`replace` and `to_moh`: they change whole models, so they stand in `models.surgery`, and are known here too."""
    if name in ("replace", "to_moh"):
        return getattr(import_module("models.surgery"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
