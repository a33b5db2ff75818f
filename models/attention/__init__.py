"""The attention contract, and the check of every place before a run.

A backbone describes each place where tokens are mixed with a `Site` and hands all of them to `build`, together with the
factory (or one factory per stage) that the configuration chose. What comes back is one `Mixer` per site; see
`models.attention.contract`, whose names are known here too.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import groupby
from typing import Any, get_args, get_type_hints

from torch import nn

from conf.errors import UserError
from conf.names import PARTS
from models.attention.contract import BACKENDS as BACKENDS
from models.attention.contract import KINDS as KINDS
from models.attention.contract import Accepts as Accepts
from models.attention.contract import AttentionFactory as AttentionFactory
from models.attention.contract import Grid as Grid
from models.attention.contract import Mixed as Mixed
from models.attention.contract import Mixer as Mixer
from models.attention.contract import Refused as Refused
from models.attention.contract import Runs as Runs
from models.attention.contract import Site as Site
from models.attention.contract import TokenWeights as TokenWeights

WRAPPED = ("core", "first", "rest")  # options by which a mechanism takes others


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
            mixer = make(factories[site.stage], site)
            check(mixer, site)
            mixers.append(mixer)
        except Refused as refusal:
            problems.append((site, refusal))
    if problems:
        raise UserError(misfits("attention", "mechanism", problems, len(sites)))
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


def make(factory: AttentionFactory, site: Site) -> Mixer:
    """The mixer of a site. Parts that are chosen for what wraps mechanisms, such as MoH, go to what it wraps.

    Raises:
        Refused: a part that the mechanism has no place for.
    """
    function, given = unwrapped(factory)
    parts = {name: given[name] for name in PARTS if callable(given.get(name))}
    hints = options_of(factory) if parts else {}
    unknown = sorted(
        name for name in parts if hints.get(name, bool) is bool
    )  # agents have a bias of their own, or none
    if not unknown:
        return factory(site)
    others = {name: value for name, value in given.items() if name not in unknown}
    wrapped = {name: others[name] for name in WRAPPED if callable(others.get(name))}
    if not wrapped:
        raise Refused(_no_place(unknown[0]), f"leave out attention/{unknown[0]}, or choose e.g. attention=softmax")
    moved = {name: parts[name] for name in unknown}
    others |= {name: partial(inner, **moved) for name, inner in wrapped.items()}
    return function(site, **others)


def unwrapped(factory: AttentionFactory) -> tuple[Callable, dict[str, Any]]:
    """The function behind partial ones, and all options that these give."""
    given: dict[str, Any] = {}
    while isinstance(factory, partial):
        factory, given = factory.func, factory.keywords | given
    return factory, given


def _no_place(part: str) -> str:
    if part == "layout":
        return "the mechanism decides by itself who sees whom, so it takes no layout"
    if part in ("score", "bias", "weights", "factor"):
        return f"the mechanism has no logits of queries and keys on which attention/{part} could work"
    return f"the mechanism has no place for attention/{part}"


def options_of(factory: AttentionFactory) -> dict[str, Any]:
    """The types of all options of a factory by their name, those that it shares with others included."""
    function, _ = unwrapped(factory)
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    options = {}
    for name, option in inspect.signature(function).parameters.items():
        if option.kind is option.VAR_KEYWORD and name in hints:
            options |= get_args(hints[name])[0].__annotations__
        elif option.kind is option.KEYWORD_ONLY:
            options[name] = hints.get(name)
    return options


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


def misfits(who: str, what: str, problems: list[tuple[Site, Refused]], total: int) -> str:
    """What is wrong with a chosen part: one line per run of neighbouring blocks with the same shape and reason."""
    lines = [f"{who}: {len(problems)} of {total} places cannot take the chosen {what}:"]
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
