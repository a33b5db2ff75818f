"""Weights in somebody else's names to ours and back, strictly: a name or a shape that does not fit is an error.

What the names are elsewhere stands in one file per source repository (`biformer.py`, `davit.py`, …), found by the
first word of the model's name. Values are renamed and reshaped, never computed with, so that a round trip gives the
same bits, and gradients pass through.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from models import create_model, list_models
from models.checkpoints.layout import OURS, Layout
from models.checkpoints.weights import strip, unwrap

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    import torch
    from torch import Tensor

COUNTER = "num_batches_tracked"  # of batch norms; files from before torch 0.4.1 have none
DETECTOR = "backbone."
HEAD = "head."


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
        num_classes: refuse a head for any other number of classes, and none; None takes every head.
        settings: those that the model was made with, see `models.create_model`.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs; the message names it, and a model that would fit.
    """
    import torch

    state = _weights(state_dict, "convert")
    table = _best(_tables(name, settings), state)
    if problem := _problem(table, state, name):
        raise ValueError(f"convert: {problem}; {_advice(state, name)}")
    if problem := _wrong_classes(table, state, num_classes):
        raise ValueError(f"convert: {problem}")
    for model, text in table.layout.warning:
        if model == name and "attention" not in settings:
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
        exportable = ", ".join(other for other in list_models() if _family(other))
        raise ValueError(f"export: {name} has no names but ours, got no other layout; available for {exportable}")
    ours = convert(state_dict, name, **settings)
    layout = family.authors(name)
    return {layout.theirs(mine): layout.give(mine, value) for mine, value in ours.items()}


def source_of(state_dict: Mapping[str, Any], name: str, **settings: Any) -> str:
    """Whose names a file has, e.g. "timm"."""
    return _best(_tables(name, settings), _weights(state_dict, "source_of")).layout.source


def _weights(state_dict: Mapping[str, Any], who: str) -> dict[str, Tensor]:
    content = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    state = strip(unwrap(content, False, "the state dict", who), "the state dict", who)
    backbone = {key.removeprefix(DETECTOR): value for key, value in state.items() if key.startswith(DETECTOR)}
    return backbone or state


def _family(name: str) -> ModuleType | None:
    """The module with the layouts of a model; None for a model that only we have, and for no model."""
    module = f"models.checkpoints.{name.partition('_')[0]}"
    return importlib.import_module(module) if name in list_models() and importlib.util.find_spec(module) else None


def _tables(name: str, settings: dict[str, Any]) -> Iterator[_Table]:
    """Every layout for the classifier and for the pyramid of the model."""
    family = _family(name)
    for features_only in (False, True):
        shapes = (_shapes if settings else _shapes_of_file)(name, features_only=features_only, **settings)
        for layout in (OURS, *(family.LAYOUTS if family else ())):
            yield _Table(layout, {layout.theirs(key): key for key in shapes}, shapes)


def _shapes(name: str, **settings: Any) -> dict[str, torch.Size]:
    """Names and shapes of the state dict of a model, which is made without memory."""
    import torch

    with torch.device("meta"):
        model = create_model(name, **settings)
    return {key: value.shape for key, value in model.state_dict().items()}


_shapes_of_file = functools.cache(_shapes)  # a model as it stands in conf/model is asked for again and again


def _best(tables: Iterator[_Table], state: dict[str, Tensor]) -> _Table:
    """The table with the most names in common, and of those the one with the fewest that the state lacks."""
    return max(tables, key=lambda table: (len(table.names.keys() & state.keys()), -len(table.names)))


def _problem(table: _Table, state: dict[str, Tensor], name: str) -> str:
    """What keeps the state from being the model's with any number of classes; "" for nothing."""
    missing = [key for key in table.names if key not in state and not key.endswith(COUNTER)]
    unknown = [key for key in state if key not in table.names]
    if 2 * len(unknown) > len(state):
        return f"{len(unknown)} of the {len(state)} names in the file are none of {name}, got {some(unknown)}"
    if missing:
        return f"the file lacks {some(missing)} of {name} (names of {table.layout.source})"
    if unknown:
        return f"the file has {some(unknown)}, which {name} has not (names of {table.layout.source})"
    present = [(theirs, mine) for theirs, mine in table.names.items() if theirs in state]
    return next(filter(None, (_misfit(theirs, mine, table, state[theirs], name) for theirs, mine in present)), "")


def _misfit(theirs: str, mine: str, table: _Table, value: Tensor, name: str) -> str:
    """What is wrong with the shape of a value; the head may have any number of classes."""
    wanted, got = tuple(table.shapes[mine]), tuple(table.layout.take(value).shape)
    free = int(mine.startswith(HEAD))
    if len(got) == len(wanted) and got[free:] == wanted[free:]:
        return ""
    sides = ", ".join(["classes"] * free + [str(side) for side in wanted[free:]])
    return f"{theirs} must have the shape ({sides}) in {name}, got {got}"


def _wrong_classes(table: _Table, state: dict[str, Tensor], num_classes: int | None) -> str:
    """What is wrong with the number of classes; "" for nothing."""
    if num_classes is not None and not any(mine.startswith(HEAD) for mine in table.names.values()):
        return (
            "the file has no classifier, got the backbone of a detector or segmenter; give a classification checkpoint"
        )
    classes = {theirs: len(state[theirs]) for theirs, mine in table.names.items() if mine.startswith(HEAD)}
    if len(set(classes.values())) > 1:
        return f"the parts of the head must have one number of classes, got {classes}; fetch the file again"
    for found in set(classes.values()) - {num_classes}:
        if num_classes is not None:
            return (
                f"the file must have {num_classes} classes, got {found}; fine-tune it, or evaluate it on data with "
                f"{found} classes"
            )
    return ""


def _advice(state: dict[str, Tensor], name: str) -> str:
    """Which other model of the family the weights are of."""
    family = name.partition("_")[0]
    others = [other for other in list_models() if other.partition("_")[0] == family and other != name]
    fitting = [other for other in others if not _problem(_best(_tables(other, {}), state), state, other)]
    if fitting:
        return f"it holds {' or '.join(fitting)}"
    return "give the model, and the settings, that the file was saved from"


def some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
