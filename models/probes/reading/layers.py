"""Which layers of a model a probe looks at."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from conf.errors import UserError
from conf.names import nearest
from conf.values import is_whole
from models.attention import Mixer, mixers_of


def has_matrix(mixer: Mixer) -> bool:
    """Whether it has an attention matrix."""
    return mixer.has_matrix


def chosen_layers(
    who: str,
    model: nn.Module,
    layers: str | int | Sequence[str | int],
    has: Callable[[Mixer], bool] = has_matrix,
    what: str = "attention matrix",
    choose: str = "a model with e.g. softmax",
) -> dict[str, Mixer]:
    """Mixers by name, in order.

    Args:
        who: names the probe.
        model: any.
        layers: "all" that have what is looked at, the number of a mixer from 0, from the last with a minus, its name,
            or a list of these.
        has: whether a mixer can be looked at.
        what: it has then.
        choose: what would have layers with it.

    Raises:
        UserError: no such layer; one that has it not, or none of all; a model that is shown no images.
    """
    if getattr(model, "generates", False):
        raise UserError(f"{who}: {type(model).__name__} generates images, so it is shown none; choose a classifier")
    mixers = dict(mixers_of(model))
    if layers == "all":
        found = {name: mixer for name, mixer in mixers.items() if has(mixer)}
        if not found:
            kinds = ", ".join(sorted({kind_of(mixer) for mixer in mixers.values()})) or "no attention"
            raise UserError(f"{who}: no layer has {_article(what)}, got {kinds}; choose {choose}")
        return found
    asked = [layers] if isinstance(layers, str) or not isinstance(layers, Sequence) else list(layers)
    names = [_name(who, layer, list(mixers)) for layer in asked]
    for name in names:
        if not has(mixers[name]):
            others = [other for other, mixer in mixers.items() if has(mixer)]
            why = f", since {mixers[name].without_matrix}" if has is has_matrix else ""
            fix = f"choose of {_some(others)}" if others else "no layer of the model has"
            raise UserError(f"{who}: {name} ({kind_of(mixers[name])}) has no {what}{why}; {fix}")
    return {name: mixers[name] for name in mixers if name in names}


def kind_of(mixer: Mixer) -> str:
    """What people call it: its class, for multi-head mixers that of its core."""
    return type(getattr(mixer, "core", mixer)).__name__


def _name(who: str, layer: Any, names: list[str]) -> str:
    if is_whole(layer, -len(names)) and layer < len(names):
        return names[layer]
    if layer in names:
        return layer
    raise UserError(
        f"{who}: there is no layer {layer!r}{nearest(str(layer), names)}; set probe.layers to all, a number up to "
        f"{len(names) - 1}, or of {_some(names)}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, … {names[-1]}"


def _article(what: str) -> str:
    return what if what.split()[0].endswith("s") else f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
