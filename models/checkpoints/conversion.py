"""Weights in somebody else's names to ours and back, strictly: a name or a shape that does not fit is an error.

What the names are elsewhere stands in one file per source repository (`biformer.py`, `davit.py`, …), found by the
first word of the model's name. Values are renamed and reshaped, never computed with, so that a round trip gives the
same bits, and gradients pass through. The one exception: tables that are bound to the size of the image are resized
when the model was made for another size than the file, by the module that owns them (`resized`), with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.compose import compose_run
from conf.errors import UserError
from conf.names import PARTS, PLACES
from models import list_models
from models.checkpoints.fitting import (
    DETECTOR,
    MADE,
    Table,
    advice,
    best,
    family_of,
    learned,
    prefix_of,
    problem_of,
    some,
    tables,
    wrong_classes,
)
from models.checkpoints.weights import strip, unwrap

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    from torch import Tensor


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
        settings: those that the model was made with, see `models.create_model`. Where its image size is another one
            than that of the file, position tables, agent biases and the like are resized, and a warning says which.
            The file's are taken to be of square images and windows.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs; the message names it, and a model that would fit.
    """
    found = converted(state_dict, name, num_classes=num_classes, **settings)
    for note in found.told():
        warnings.warn(note, stacklevel=2)
    return found.weights


class Converted(NamedTuple):
    """Weights under our names, those that were resized, and what else a user should know, a sentence each."""

    weights: dict[str, Tensor]
    resized: list[str]
    notes: list[str]
    about: str  # the model and the source

    def told(self) -> list[str]:
        """The notes, and what was resized."""
        text = "tables made for another image size, window or number of agents were resized"
        return [*self.notes, *([f"{self.about}: {text}: {some(self.resized)}"] if self.resized else [])]


def converted(
    state_dict: Mapping[str, Any], name: str, *, num_classes: int | None = None, **settings: Any
) -> Converted:
    """As `convert`, without warnings."""
    table, state, notes = _matched(state_dict, name, settings, "convert", resize=True)
    if problem := wrong_classes(table, state, num_classes):
        raise UserError(f"convert: {problem}")
    about = f"convert: {name} from {table.layout.source}"
    notes += [
        f"{about}: {text}" for model, text in table.layout.warning if model == name and "attention" not in settings
    ]
    ours = _ours(table, state)
    other = [mine for mine in ours if mine in table.model.resized and ours[mine].shape != table.model.shapes[mine]]
    if other:
        ours |= {mine: table.model.resized[mine](ours[mine]) for mine in other}
    return Converted(ours, other, notes, about)


def export(state_dict: Mapping[str, Tensor], name: str, **settings: Any) -> dict[str, Tensor]:
    """Our weights of a model, or of its pyramid, under the names in which its authors published them.

    Args:
        state_dict: of `create_model(name, **settings)`, or with `features_only=True`.

    Raises:
        ValueError: the weights are not those of the model, or nobody else has it.
    """
    family = family_of(name)
    if family is None:
        exportable = ", ".join(sorted({f"{other.partition('_')[0]}_*" for other in list_models() if family_of(other)}))
        raise UserError(f"export: {name} has no names but ours, got no other layout; available for {exportable}")
    ours = _ours(*_matched(state_dict, name, settings, "export", resize=False)[:2])
    layout = family.authors(name)
    parts = layout.names(ours)
    dims = {mine: layout.head_dim(mine, lambda other: ours[other].shape) for mine in ours}
    theirs = [layout.give(mine, value, parts[mine], dims[mine]) for mine, value in ours.items()]
    if layout.make_constants is not None:
        theirs.append(layout.make_constants(ours))
    return {key: value for weights in theirs for key, value in weights.items()}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the model of a run differs from `create_model(name)`, as settings for `convert` and `export`.

    Args:
        config: the resolved configuration of the run; of it `run`, `model` and `attention` are looked at.
    """
    name, attention = config["run"]["model"], config["run"]["attention"]
    composed = compose_run([f"model={name}", f"attention={attention}"])[0]
    usual = composed.attention
    given = config["attention"] if isinstance(config["attention"], dict) else {}
    settings = {}
    for key, value in (given | config["model"]).items():
        if key.startswith("_") or key in ("num_classes", "attention"):
            continue
        if key in PLACES and value is None:
            continue
        if not isinstance(value, dict) or (key in (*PARTS, *PLACES) and key not in usual):
            settings[key] = value
            continue
        part = usual[key] if key in usual else composed.model.get(key)  # such as those of plans
        if part is not None and value.get("_target_") == part.get("_target_"):
            settings[key] = {option: item for option, item in value.items() if not option.startswith("_")}
    own = compose_run([f"model={name}"])[1]["attention"]
    return settings | ({} if attention == own else {"attention": attention})


def _matched(
    state_dict: Mapping[str, Any], name: str, settings: dict[str, Any], who: str, *, resize: bool
) -> tuple[Table, dict[str, Tensor], list[str]]:
    """The way to read a file, and what it holds for the model, with notes; one that does not fit is an error."""
    known = list(tables(name, settings))
    state, notes = _weights(state_dict, known, who)
    table = best(known, state)
    state = learned(table, state)
    if problem := problem_of(table, state, name, resize):
        raise UserError(f"{who}: {problem}; {advice(state, name)}")
    return table, state, notes


def _ours(table: Table, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file that fits under our names; what it may lack is made."""
    import torch

    ours = {}
    for mine, parts in table.parts.items():
        if all(part.name in state for part in parts):
            ours[mine] = table.take(mine, state)
        else:
            ours[mine] = table.model.resized[mine](torch.empty(0)) if mine.endswith(MADE) else torch.tensor(0)
    return ours


def source_of(state_dict: Mapping[str, Any], name: str, **settings: Any) -> str:
    """Whose names a file has, e.g. "timm"."""
    known = list(tables(name, settings))
    return best(known, _weights(state_dict, known, "source_of")[0]).layout.source


def _weights(state_dict: Mapping[str, Any], known: list[Table], who: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a file, without the prefix behind which they are the model's, and what is left out."""
    content = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    state = strip(unwrap(content, False, "the state dict", who), "the state dict", who)
    prefix = prefix_of(state, known)
    below = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    left = [key for key in state if not key.startswith(prefix)] if not prefix.endswith(DETECTOR) else []
    return below, [f"{who}: the weights below {prefix!r} were taken, and {some(left)} left out"] if left else []
