"""Weights in somebody else's names to ours and back, strictly: a name or a shape that does not fit is an error.

What the names are elsewhere stands in one file per source repository (`biformer.py`, `davit.py`, …), found by the
first word of the model's name. Values are renamed and reshaped, never computed with, so that a round trip gives the
same bits, and gradients pass through.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import create_model, list_models
from models.checkpoints.layout import OURS, Layout
from models.checkpoints.weights import strip, unwrap

COUNTER = "num_batches_tracked"  # of batch norms; files from before torch 0.4.1 have none
DETECTOR = "backbone."


class _Table(NamedTuple):
    """One way to read a file: a layout, and our names and values by their names."""

    layout: Layout
    names: dict[str, str]  # theirs → ours
    shapes: dict[str, torch.Size]  # ours


def convert(
    state_dict: Mapping[str, Any], name: str, *, num_classes: int | None = None, **settings: Any
) -> dict[str, Tensor]:
    """The authors' weights of a model under our names, ready for `load_state_dict(strict=True)`.

    Args:
        state_dict: what a published file holds: weights in the authors' names (in any form that they released), in
            timm's where it has the model, or in ours; as they are, below `model` or `state_dict`, or with prefixes such
            as `module.`. Of a detector's or segmenter's file the backbone is taken: then the result is for
            `create_model(name, features_only=True)`.
        name: the model, see `models.list_models`.
        num_classes: refuse a head for any other number of classes; None takes every head.
        settings: those that the model was made with, see `models.create_model`.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs; the message names it, and a model that would fit.
    """
    state = _weights(state_dict)
    table = _best(_tables(name, settings), state)
    if problem := _problem(table, state, name, num_classes):
        raise ValueError(f"convert: {problem}{_hint(state, name)}")
    for model, text in table.layout.warning:
        if model == name:
            warnings.warn(f"convert: {name} from {table.layout.source}: {text}", stacklevel=2)
    ours = {mine: table.layout.take(state[theirs]) for theirs, mine in table.names.items() if theirs in state}
    return {mine: ours[mine] if mine in ours else torch.tensor(0) for mine in table.names.values()}


def export(state_dict: Mapping[str, Tensor], name: str, **settings: Any) -> dict[str, Tensor]:
    """Our weights of a model, or of its pyramid, under the names in which its authors published them.

    Args:
        state_dict: of `create_model(name, **settings)`, or with `features_only=True`.

    Raises:
        ValueError: the weights are not those of the model, or nobody else has it.
    """
    family = _family(name)
    if family is None:
        raise ValueError(f"export: {name} has no authors' names; available for {', '.join(_exportable())}")
    ours = convert(state_dict, name, **settings)
    layout = family.authors(name)
    return {layout.theirs(mine): layout.give(mine, value) for mine, value in ours.items()}


def source_of(state_dict: Mapping[str, Any], name: str, **settings: Any) -> str:
    """Whose names a file has, e.g. "timm"."""
    return _best(_tables(name, settings), _weights(state_dict)).layout.source


def _weights(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    state = strip(unwrap(dict(state_dict), ema=False, where="the state dict"), "the state dict")
    backbone = {key.removeprefix(DETECTOR): value for key, value in state.items() if key.startswith(DETECTOR)}
    return backbone or state


def _family(name: str) -> ModuleType | None:
    module = f"models.checkpoints.{name.partition('_')[0]}"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def _exportable() -> list[str]:
    return [name for name in list_models() if _family(name)]


def _tables(name: str, settings: dict[str, Any]) -> Iterator[_Table]:
    """Every layout for the classifier and for the pyramid of the model."""
    family = _family(name)
    for features_only in (False, True):
        with torch.device("meta"):
            model = create_model(name, features_only=features_only, **settings)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        for layout in (OURS, *(family.LAYOUTS if family else ())):
            yield _Table(layout, {layout.theirs(key): key for key in shapes}, shapes)


def _best(tables: Iterator[_Table], state: dict[str, Tensor]) -> _Table:
    """The table with the most names in common, and of those the one with the fewest that the state lacks."""
    return max(tables, key=lambda table: (len(table.names.keys() & state.keys()), -len(table.names)))


def _problem(table: _Table, state: dict[str, Tensor], name: str, num_classes: int | None) -> str:
    """What keeps the state from being the model's, as one sentence; "" for nothing."""
    missing = [key for key in table.names if key not in state and not key.endswith(COUNTER)]
    unknown = [key for key in state if key not in table.names]
    if len(unknown) == len(state):
        return f"no name in the file is one of {name}, got {some(unknown)}; give the model that the file was saved from"
    if missing:
        return f"the file lacks {some(missing)} of {name} (names of {table.layout.source})"
    if unknown:
        return f"the file has {some(unknown)}, which {name} has not (names of {table.layout.source})"
    for theirs, mine in table.names.items():
        if theirs in state and (text := _misfit(theirs, mine, table, state[theirs], name, num_classes)):
            return text
    return ""


def _misfit(theirs: str, mine: str, table: _Table, value: Tensor, name: str, num_classes: int | None) -> str:
    wanted, got = tuple(table.shapes[mine]), tuple(table.layout.take(value).shape)
    if not mine.startswith("head."):
        return "" if got == wanted else f"{theirs} must have the shape {wanted} in {name}, got {got}"
    if got[1:] != wanted[1:]:
        return f"{theirs} must have the shape (classes, {', '.join(map(str, wanted[1:]))}) in {name}, got {got}"
    if num_classes is not None and got[0] != num_classes:
        return (
            f"the file has {got[0]} classes, {num_classes} are asked for; fine-tune it, or evaluate it on data with "
            f"{got[0]} classes"
        )
    return ""


def _hint(state: dict[str, Tensor], name: str) -> str:
    """Which other model of the family the weights are of."""
    family = name.partition("_")[0]
    others = [other for other in list_models() if other.partition("_")[0] == family and other != name]
    fitting = [other for other in others if not _problem(_best(_tables(other, {}), state), state, other, None)]
    return f"; it holds {' or '.join(fitting)}" if fitting else ""


def some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
