"""Weights of a model for the same backbone with another mechanism or other parts: what fits is kept, the rest named.

What is new or left over must be in a place that can be chosen (an attention, a gate, a pool, a head or a wrapper), be a
class token, or be the norms of a block that is ConvNeXt's here and a transformer's there.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from models.attention import mixers_of
from models.attention.moh import MoHAttention, start_undecided
from models.checkpoints.fitting import COUNTER, classes_of, is_of_classes
from models.layers.resizable import Resizable

PLACES = ("gate", "pooling", "head", "head_norm", "wrapper")
# in ConvNeXt's block, and in a transformer's: the one before the MLP
_OF_CONVNEXT = (("norm2.", "norm."), ("norm.", "norm2."), ("scale2.", "scale."), ("scale.", "scale2."))
_BLOCK = re.compile(r"((?:stages\.\d+\.)?blocks\.\d+)\.(norm1?|scale1?)\.")


class Transplant(NamedTuple):
    """Weights that make up a model, and what became of them: how many numbers, by the names of the model or the file.

    `classes` are those of the file and of the model where the head starts anew.
    """

    weights: dict[str, Tensor]
    kept: dict[str, int]
    resized: dict[str, int]
    new: dict[str, int]  # of the model, as it has them now
    dropped: dict[str, int]  # of the file
    classes: tuple[int | None, int | None] | None = None

    def with_resized(self, names: Iterable[str]) -> "Transplant":
        """The same with these, which were resized on their way here, among the resized."""
        also = {name: self.kept[name] for name in names if name in self.kept}
        kept = {name: count for name, count in self.kept.items() if name not in also}
        return self._replace(kept=kept, resized=self.resized | also)

    def __str__(self) -> str:
        groups = {"kept": self.kept, "resized": self.resized, "new": self.new, "dropped": self.dropped}
        lines = ["the weights are of another attention or other parts:"]
        for what, names in groups.items():
            shown = {name: count for name, count in names.items() if self.classes is None or not is_of_classes(name)}
            listed = (
                f"{sum(shown.values()):,} parameters: {_listed(shown, short=what == 'kept')}" if shown else "nothing"
            )
            lines += [f"  {what:8} {listed}"] if shown or what != "resized" else []
        if self.classes is not None:
            was, now = self.classes
            lines.append(f"  {'head':8} new: {now} classes, {was or 'none'} in the weights")
        return "\n".join(lines)


def transplanted(state: Mapping[str, Tensor], model: nn.Module) -> Transplant | None:
    """The weights of the same backbone, with what `model` has in the places that differ; None where they are not.

    Routers of head gates that are new begin undecided.

    Args:
        state: in our names.
        model: with values, of which the new ones are taken.
    """
    places, modules, own = {name for name, _ in mixers_of(model)}, dict(model.named_modules()), model.state_dict()
    taken, groups, used = {}, ({}, {}, {}), set()
    kept, resized, new = groups
    for name, value in own.items():
        source = next((other for other in _sources(name) if other in state), None)
        found = None if source is None else _fitted(_given(state, source, own), value, name, modules)
        weight = name.removesuffix("bias") + "weight"
        if found is not None and weight not in new:  # a bias goes with its weight
            taken[name] = found
            used.add(source)
            (kept if found.shape == state[source].shape else resized)[name] = _count(name, value)
        elif found is not None or _may_differ(name, places, own, state):
            new[name] = _count(name, value)
        else:
            return None
    dropped = {name: _count(name, value) for name, value in state.items() if name not in used}
    if not all(_may_differ(name, places, own, state) for name in dropped):
        return None
    for name, module in modules.items():
        if isinstance(module, MoHAttention) and any(key.startswith(f"{name}.router.") for key in new):
            start_undecided(module.router)
    classes = (classes_of(state), classes_of(own)) if any(map(is_of_classes, new)) else None
    weights = {name: taken.get(name, value) for name, value in model.state_dict().items()}
    return Transplant(weights, *groups, dropped, classes)


def _sources(name: str) -> Iterable[str]:
    """Where a weight may be in a file: under its own name, with or without head gates, in the other kind of block."""
    yield name
    owner, mixer, rest = name.rpartition(".attn.")
    yield from (f"{owner}{mixer}{rest.removeprefix('mixer.')}", f"{owner}{mixer}mixer.{rest}")
    block, _, rest = name.rpartition(".blocks.")
    number, _, rest = rest.partition(".")
    for ours, theirs in _OF_CONVNEXT:
        if block and rest.startswith(ours):
            yield f"{block}.blocks.{number}.{theirs}{rest.removeprefix(ours)}"


def _given(state: Mapping[str, Tensor], name: str, own: Mapping[str, Tensor]) -> Tensor:
    """A weight of a file; a table of positions without the place of a class token that the model lacks."""
    tokens = [any(key.endswith("class_token") for key in weights) for weights in (state, own)]
    return state[name][:, 1:] if name.endswith("position.table") and tokens == [True, False] else state[name]


def _fitted(value: Tensor, like: Tensor, name: str, modules: Mapping[str, nn.Module]) -> Tensor | None:
    """The value, resized where the module that has it knows how; None where it has another shape."""
    if value.shape == like.shape:
        return value
    owner, _, leaf = name.rpartition(".")
    if name.startswith("stem.") and isinstance(modules[owner], nn.Conv2d) and leaf == "weight":
        return _of_channels(value, like)
    if not isinstance(modules[owner], Resizable):
        return None
    try:
        resized = modules[owner].resized(leaf, value)
    except ValueError:
        return None
    return resized if resized.shape == like.shape else None


def _of_channels(value: Tensor, like: Tensor) -> Tensor | None:
    """The first convolution for images of other channels, as timm has it: summed for one, else repeated and scaled."""
    theirs, ours = value.shape[1], like.shape[1]
    if value.ndim != 4 or (value.shape[0], *value.shape[2:]) != (like.shape[0], *like.shape[2:]):
        return None
    if ours == 1:
        return value.sum(1, keepdim=True)
    return value.repeat(1, -(-ours // theirs), 1, 1)[:, :ours] * (theirs / ours)


def _may_differ(name: str, places: Iterable[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    """Whether a weight is in a place that can be chosen, or goes with what is there."""
    parts = name.split(".")
    if any(name.startswith(f"{place}.") for place in places) or any(place in parts for place in PLACES):
        return True
    block = _BLOCK.match(name)
    kinds = [f"{block[1]}.norm.weight" in weights for weights in (own, state)] if block else [False, False]
    return parts[-1] == "class_token" or kinds[0] != kinds[1]


def _count(name: str, value: Tensor) -> int:
    return 0 if name.endswith(COUNTER) else value.numel()


def _listed(names: Iterable[str], short: bool) -> str:
    """By what they are called within their block, and how many there are of each; `short` names modules."""
    counts: dict[str, int] = {}
    for name in names:
        inside = re.sub(r"^(.*\.)?blocks\.\d+\.|^stages\.\d+\.", "", name)
        inside = inside.partition("attn.")[2] or inside
        if short:
            owner = inside.rpartition(".")[0] or inside
            inside = owner if "attn." in name else owner.partition(".")[0]
        counts[inside] = counts.get(inside, 0) + 1
    if short:
        return ", ".join(counts)
    return ", ".join(f"{inside} ({count})" if count > 1 else inside for inside, count in counts.items())
