"""Weights in somebody else's names to ours and back, strictly: a name or a shape that does not fit is an error.

What the names are elsewhere stands in one file per source repository (`biformer.py`, `davit.py`, …), found by the
first word of the model's name. Values are renamed and reshaped, never computed with, so that a round trip gives the
same bits, and gradients pass through. The one exception: tables that are bound to the size of the image are resized
when the model was made for another size than the file, by the module that owns them (`resized`), with a warning.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from conf.cli import compose_run
from models import create_model, list_models
from models.checkpoints.layout import OURS, Layout, Part
from models.checkpoints.weights import strip, unwrap

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    import torch
    from torch import Tensor

COUNTER = "num_batches_tracked"  # of batch norms; files from before torch 0.4.1 have none
MASK = ".shift_mask"  # of windows; whether there is one depends on the size of the map
DETECTOR = "backbone."
HEAD = "head."


class _Skeleton(NamedTuple):
    """A model without values."""

    shapes: dict[str, torch.Size]  # by our names
    resized: dict[str, Callable[[Tensor], Tensor]]  # tables bound to the size of the image: one of another size → ours


class _Table(NamedTuple):
    """One way to read a file: a layout, and its names for ours."""

    layout: Layout
    parts: dict[str, tuple[Part, ...]]  # by our names
    model: _Skeleton

    @property
    def names(self) -> dict[str, tuple[str, Part]]:
        """Our name by each of theirs."""
        return {part.name: (mine, part) for mine, parts in self.parts.items() for part in parts}

    def take(self, mine: str, state: Mapping[str, Tensor]) -> Tensor:
        """Our weight from a state in their names, of the size that it has there."""
        import torch

        pieces = [self.layout.take(part.name, state[part.name]) for part in self.parts[mine]]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


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
    table, state = _matched(state_dict, name, settings, "convert", resize=True)
    if problem := _wrong_classes(table, state, num_classes):
        raise ValueError(f"convert: {problem}")
    for model, text in table.layout.warning:
        if model == name and "attention" not in settings:
            warnings.warn(f"convert: {name} from {table.layout.source}: {text}", stacklevel=2)
    ours = _ours(table, state)
    other = [mine for mine in ours if mine in table.model.resized and ours[mine].shape != table.model.shapes[mine]]
    if other:
        ours |= {mine: table.model.resized[mine](ours[mine]) for mine in other}
        text = f"tables made for another image size, window or number of agents were resized: {some(other)}"
        warnings.warn(f"convert: {name} from {table.layout.source}: {text}", stacklevel=2)
    return ours


def export(state_dict: Mapping[str, Tensor], name: str, **settings: Any) -> dict[str, Tensor]:
    """Our weights of a model, or of its pyramid, under the names in which its authors published them.

    Args:
        state_dict: of `create_model(name, **settings)`, or with `features_only=True`.

    Raises:
        ValueError: the weights are not those of the model, or nobody else has it.
    """
    family = _family(name)
    if family is None:
        exportable = ", ".join(sorted({f"{other.partition('_')[0]}_*" for other in list_models() if _family(other)}))
        raise ValueError(f"export: {name} has no names but ours, got no other layout; available for {exportable}")
    ours = _ours(*_matched(state_dict, name, settings, "export", resize=False))
    layout = family.authors(name)
    parts = layout.names(ours)
    theirs = [layout.give(mine, value, parts[mine]) for mine, value in ours.items()]
    if layout.make_constants is not None:
        theirs.append(layout.make_constants(ours))
    return {key: value for weights in theirs for key, value in weights.items()}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the model of a run differs from `create_model(name)`, as settings for `convert` and `export`.

    Args:
        config: the resolved configuration of the run; of it `run`, `model` and `attention` are looked at.
    """
    name, attention = config["run"]["model"], config["run"]["attention"]
    usual = compose_run([f"model={name}", f"attention={attention}"])[0].attention
    given = config["attention"] if isinstance(config["attention"], dict) else {}
    settings = {}
    for key, value in (given | config["model"]).items():
        if key.startswith("_") or key in ("num_classes", "attention"):
            continue
        if not isinstance(value, dict):
            settings[key] = value
        elif key in usual and value.get("_target_") == usual[key].get("_target_"):  # a part, such as those of plans
            settings[key] = {option: item for option, item in value.items() if not option.startswith("_")}
    own = compose_run([f"model={name}"])[1]["attention"]
    return settings | ({} if attention == own else {"attention": attention})


def _matched(
    state_dict: Mapping[str, Any], name: str, settings: dict[str, Any], who: str, *, resize: bool
) -> tuple[_Table, dict[str, Tensor]]:
    """The way to read a file, and what it holds for the model; one that does not fit is an error."""
    state = _weights(state_dict, who)
    table = _best(_tables(name, settings), state)
    state = _learned(table, state)
    if problem := _problem(table, state, name, resize):
        raise ValueError(f"{who}: {problem}; {_advice(state, name)}")
    return table, state


def _ours(table: _Table, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file that fits under our names; what it may lack is made."""
    import torch

    ours = {}
    for mine, parts in table.parts.items():
        if all(part.name in state for part in parts):
            ours[mine] = table.take(mine, state)
        else:
            ours[mine] = table.model.resized[mine](torch.empty(0)) if mine.endswith(MASK) else torch.tensor(0)
    return ours


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
        model = (_skeleton if settings else _skeleton_of_file)(name, features_only=features_only, **settings)
        for layout in (OURS, *(family.LAYOUTS if family else ())):
            yield _Table(layout, layout.names(model.shapes), model)


def _skeleton(name: str, **settings: Any) -> _Skeleton:
    """Names and shapes of the state dict of a model, which is made without memory."""
    import torch

    with torch.device("meta"):
        model = create_model(name, **settings)
    resized = {
        f"{path}.{key}": functools.partial(module.resized, key)
        for path, module in model.named_modules()
        if hasattr(module, "resized")
        for key in (*module._parameters, *module._buffers)
    }
    return _Skeleton({key: value.shape for key, value in model.state_dict().items()}, resized)


_skeleton_of_file = functools.cache(_skeleton)  # a model as it stands in conf/model is asked for again and again


def _best(tables: Iterator[_Table], state: dict[str, Tensor]) -> _Table:
    """The table with the most names in common, and of those the one with the fewest that the state lacks."""
    return max(tables, key=lambda table: (len(table.names.keys() & state.keys()), -len(table.names)))


def _learned(table: _Table, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without constants that the model has no use for, such as the indices of windows."""
    layout, names = table.layout, table.names
    constants = "|".join(pattern for pattern in (re.escape(MASK) + "$", layout.constants, layout.masks) if pattern)
    return {key: value for key, value in state.items() if key in names or not re.search(constants, key)}


def _problem(table: _Table, state: dict[str, Tensor], name: str, resize: bool = False) -> str:
    """What keeps the state from being the model's with any number of classes; "" for nothing.

    With `resize` tables that are bound to the image size may be of another one.
    """
    names = table.names
    missing = [key for key, (mine, _) in names.items() if key not in state and not mine.endswith((COUNTER, MASK))]
    unknown = [key for key in state if key not in names]
    if 2 * len(unknown) > len(state):
        return f"{len(unknown)} of the {len(state)} names in the file are none of {name}, got {some(unknown)}"
    if missing:
        return f"the file lacks {some(missing)} of {name} (names of {table.layout.source})"
    if unknown:
        return f"the file has {some(unknown)}, which {name} has not (names of {table.layout.source})"
    misfits = (_misfit(mine, part, table, state, name, resize) for mine, part in names.values() if part.name in state)
    return next(filter(None, misfits), "")


def _misfit(mine: str, part: Part, table: _Table, state: dict[str, Tensor], name: str, resize: bool) -> str:
    """What is wrong with the shape of a value; the head may have any number of classes."""
    taken = table.layout.take(part.name, state[part.name])
    wanted, got = table.layout.shape_of(part, table.model.shapes[mine]), tuple(taken.shape)
    free = int(mine.startswith(HEAD))
    if len(got) == len(wanted) and got[free:] == wanted[free:]:
        return ""
    sides = ", ".join(["classes"] * free + [str(side) for side in wanted[free:]])
    text = f"{part.name} must have the shape ({sides}) in {name}, got {got}"
    if not resize or mine not in table.model.resized:
        return text
    try:
        fits = table.model.resized[mine](taken.detach()).shape == wanted
    except ValueError as error:
        return f"{text}: {error}"
    return "" if fits else text


def _wrong_classes(table: _Table, state: dict[str, Tensor], num_classes: int | None) -> str:
    """What is wrong with the number of classes; "" for nothing."""
    if num_classes is not None and not any(mine.startswith(HEAD) for mine in table.parts):
        return (
            "the file has no classifier, got the backbone of a detector or segmenter; give a classification checkpoint"
        )
    classes = {theirs: len(state[theirs]) for theirs, (mine, _) in table.names.items() if mine.startswith(HEAD)}
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
    fitting = [other for other in others if _fits(other, state)]
    if fitting:
        return f"it holds {' or '.join(fitting)}"
    return "give the model, and the settings, that the file was saved from"


def _fits(name: str, state: dict[str, Tensor]) -> bool:
    table = _best(_tables(name, {}), state)
    return not _problem(table, _learned(table, state), name)


def some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
