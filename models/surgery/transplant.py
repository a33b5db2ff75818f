"""Weights of a model for the same backbone with another mechanism or other parts: what fits is kept, the rest named.

What is new or left over must be in a place that can be chosen: an attention, a gate, a pool or a head.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from models.attention import mixers_of
from models.attention.moh import MoHAttention, start_undecided
from models.layers.resizable import Resizable

PLACES = ("gate", "pooling", "head", "head_norm")


class Transplant(NamedTuple):
    """Weights that make up a model, and what became of them, by the names of parameters and buffers."""

    weights: dict[str, Tensor]
    kept: list[str]  # in the places of attention
    new: list[str]  # of the model, as it has them now
    dropped: list[str]  # of the file

    def __str__(self) -> str:
        parts = [f"{what} {_listed(names)}" for what, names in zip(self._fields[1:], self[1:], strict=True) if names]
        return f"the weights are of another attention or other parts: {'; '.join(parts)}"


def transplanted(state: Mapping[str, Tensor], model: nn.Module) -> Transplant | None:
    """The weights of the same backbone, with what `model` has in the places that differ; None where they are not.

    Routers of head gates that are new begin undecided.

    Args:
        state: in our names.
        model: with values, of which the new ones are taken.
    """
    places = {name for name, _ in mixers_of(model)}
    modules = dict(model.named_modules())
    taken, kept, new, used = {}, [], [], set()
    for name, value in model.state_dict().items():
        source = next((other for other in _sources(name) if other in state), None)
        found = None if source is None else _fitted(state[source], value, name, modules)
        weight = name.removesuffix("bias") + "weight"
        if found is not None and weight in new:  # a bias goes with its weight
            new.append(name)
        elif found is not None:
            taken[name] = found
            used.add(source)
            kept += [name] if _within(name, places) else []
        elif _within(name, places):
            new.append(name)
        else:
            return None
    dropped = [name for name in state if name not in used]
    if not all(_within(name, places) for name in dropped):
        return None
    for name, module in modules.items():
        if isinstance(module, MoHAttention) and any(key.startswith(f"{name}.router.") for key in new):
            start_undecided(module.router)
    own = model.state_dict()
    return Transplant({name: taken.get(name, value) for name, value in own.items()}, kept, new, dropped)


def _sources(name: str) -> Iterable[str]:
    """Where a weight may be in a file: under its own name, or with or without head gates around the attention."""
    owner, mixer, rest = name.rpartition(".attn.")
    return name, f"{owner}{mixer}{rest.removeprefix('mixer.')}", f"{owner}{mixer}mixer.{rest}"


def _fitted(value: Tensor, like: Tensor, name: str, modules: Mapping[str, nn.Module]) -> Tensor | None:
    """The value, resized where the module that has it knows how; None where it has another shape."""
    if value.shape == like.shape:
        return value
    owner, _, leaf = name.rpartition(".")
    if not isinstance(modules[owner], Resizable):
        return None
    try:
        resized = modules[owner].resized(leaf, value)
    except ValueError:
        return None
    return resized if resized.shape == like.shape else None


def _within(name: str, places: Iterable[str]) -> bool:
    parts = name.split(".")
    return any(name.startswith(f"{place}.") for place in places) or any(place in parts for place in PLACES)


def _listed(names: Iterable[str]) -> str:
    """By what they are called within their place, and how many there are of each."""
    counts: dict[str, int] = {}
    for name in names:
        short = name.partition(".attn.")[2] or name
        counts[short] = counts.get(short, 0) + 1
    return ", ".join(f"{short} ({count})" if count > 1 else short for short, count in counts.items())
