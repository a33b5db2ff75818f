"""Which of the known ways to name weights a file follows, and what keeps it from being that of a model."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from conf import families
from models import create_model, list_models
from models.checkpoints.names.layout import OURS, Layout, Part
from models.checkpoints.weights import AVERAGE

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    import torch
    from torch import Tensor

DETECTOR = "backbone."  # what stands before the names of a backbone in the files of detectors and segmenters
COUNTER = "num_batches_tracked"  # of batch norms; files from before torch 0.4.1 have none
MASK = ".shift_mask"  # of windows; whether there is one depends on the size of the map
MADE = (MASK, ".sinusoid")  # what a model makes itself from the size of the map, and a file may lack
# where rows are classes, and how many rows there are besides; of Tversky heads, and of pools with classifiers, as well
CLASSES = (
    *((f"head.{name}", 0) for name in ("weight", "bias", "prototypes", "parametrizations.weight.original")),
    ("distill_head.", 0),
    ("aux_head.", 0),
    ("stem.labels.", 1),
    ("pooling.branches.", 0),
    ("pooling.class_queries", 0),
)


class Skeleton(NamedTuple):
    """A model without values."""

    shapes: dict[str, torch.Size]  # by our names
    resized: dict[str, Callable[[Tensor], Tensor]]  # tables bound to the size of the image: one of another size → ours
    dense: bool  # whether it has a pyramid


class Table(NamedTuple):
    """One way to read a file: a layout, and its names for ours."""

    layout: Layout
    parts: dict[str, tuple[Part, ...]]  # by our names
    model: Skeleton

    @property
    def names(self) -> dict[str, tuple[str, Part]]:
        """Our name by each of theirs."""
        return {part.name: (mine, part) for mine, parts in self.parts.items() for part in parts}

    def take(self, mine: str, state: Mapping[str, Tensor]) -> Tensor:
        """Our weight from a state in their names, of the size that it has there."""
        import torch

        head_dim = self.layout.head_dim(mine, lambda other: state[self.parts[other][0].name].shape)
        pieces = [self.layout.take(part.name, state[part.name], head_dim) for part in self.parts[mine]]
        return torch.cat(pieces) if len(pieces) > 1 else self.kernel(mine, pieces[0])

    def kernel(self, mine: str, value: Tensor) -> Tensor:
        """The kernel that a matrix of theirs is, where the layout has it flattened; with other sides as it is."""
        shape = self.model.shapes[mine]
        flat = self.layout.flattened and re.search(self.layout.flattened, mine)
        return value.reshape(shape) if flat and tuple(value.shape) == (shape[0], shape[1:].numel()) else value


def family_of(name: str) -> ModuleType | None:
    """The module with the layouts of a model; None for a model that only we have, and for no model."""
    module = f"models.checkpoints.names.{name.partition('_')[0]}"
    return importlib.import_module(module) if name in list_models() and importlib.util.find_spec(module) else None


def tables(name: str, settings: dict[str, Any]) -> Iterator[Table]:
    """Every layout for the whole model, for the same without its head, and for its pyramid if it has one."""
    family, made = family_of(name), skeleton if settings else _skeleton_of_file
    whole = made(name, features_only=False, **settings)
    headless = whole._replace(shapes={key: shape for key, shape in whole.shapes.items() if not is_of_classes(key)})
    pyramid = [made(name, features_only=True, **settings)] if whole.dense else []
    for model in (whole, *([headless] if len(headless.shapes) < len(whole.shapes) else []), *pyramid):
        for layout in (OURS, *(family.LAYOUTS if family else ())):
            yield Table(layout, layout.names(model.shapes), model)


def skeleton(name: str, **settings: Any) -> Skeleton:
    """Names and shapes of the state dict of a model, which is made without memory."""
    import torch

    from models.layers.resizable import Resizable

    with torch.device("meta"):
        model = create_model(name, **settings)
    resized = {
        f"{path}.{key}": functools.partial(module.resized, key)
        for path, module in model.named_modules()
        if isinstance(module, Resizable)
        for key in (*module._parameters, *module._buffers)
    }
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    dense = hasattr(model, "forward_pyramid") and not model.latent
    dense = dense and model.reducers is None and model.wrapper is None
    return Skeleton(shapes, resized, dense)


_skeleton_of_file = functools.cache(skeleton)  # a model as it stands in conf/model is asked for again and again


def prefix_of(state: Mapping[str, Tensor], known: Iterable[Table]) -> str:
    """What stands in a file before most names of the model, such as Lightning's `model.`; "" where they begin so.

    Of two with equally many, averages and teachers come last.
    """
    counts: Counter[str] = Counter()
    for table in known:
        names = table.names.keys()
        found = Counter(prefix for key in state for prefix in _prefixes(key) if key.removeprefix(prefix) in names)
        counts |= found
    if not counts:
        return DETECTOR if any(key.startswith(DETECTOR) for key in state) else ""
    return max(counts, key=lambda prefix: (counts[prefix], not AVERAGE.search(prefix), -len(prefix)))


def _prefixes(name: str) -> Iterator[str]:
    """Every beginning of a name at which it can be cut."""
    yield ""
    yield from (name[: match.end()] for match in re.finditer(r"\.", name))


def best(tables: Iterable[Table], state: dict[str, Tensor]) -> Table:
    """The table with the most names in common, and of those the one with the fewest that the state lacks."""
    return max(tables, key=lambda table: (len(table.names.keys() & state.keys()), -len(table.names)))


def learned(table: Table, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without constants that the model has no use for, such as the indices of windows, and without copies."""
    layout, names = table.layout, table.names
    constants = "|".join(pattern for pattern in (re.escape(MASK) + "$", layout.constants, layout.masks) if pattern)
    unused = {key for key in state if key not in names and (re.search(constants, key) or layout.is_copy(key, state))}
    return {key: value for key, value in state.items() if key not in unused}


def problem_of(table: Table, state: dict[str, Tensor], name: str, resize: bool = False) -> str:
    """What keeps the state from being the model's with any number of classes; "" for nothing.

    With `resize` tables that are bound to the image size may be of another one.
    """
    names = table.names
    missing = [key for key, (mine, _) in names.items() if key not in state and not mine.endswith((COUNTER, *MADE))]
    unknown = [key for key in state if key not in names]
    if 2 * len(unknown) > len(state):
        return f"{len(unknown)} of the {len(state)} names in the file are none of {name}, got {some(unknown)}"
    if missing:
        return f"the file lacks {some(missing)} of {name} (names of {table.layout.source})"
    if unknown:
        return f"the file has {some(unknown)}, which {name} has not (names of {table.layout.source})"
    misfits = (_misfit(mine, part, table, state, name, resize) for mine, part in names.values() if part.name in state)
    return next(filter(None, misfits), "")


def _misfit(mine: str, part: Part, table: Table, state: dict[str, Tensor], name: str, resize: bool) -> str:
    """What is wrong with the shape of a value; there may be any number of classes."""
    taken = table.kernel(mine, table.layout.take(part.name, state[part.name]))
    wanted, got = table.layout.shape_of(part, table.model.shapes[mine]), tuple(taken.shape)
    free = int(is_of_classes(mine))
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


def wrong_classes(table: Table, state: dict[str, Tensor], num_classes: int | None) -> str:
    """What is wrong with the number of classes; "" for nothing."""
    of_classes = {mine: parts for mine, parts in table.parts.items() if is_of_classes(mine)}
    classes = {
        parts[0].name: sum(len(table.layout.take(part.name, state[part.name])) for part in parts) - _besides(mine)
        for mine, parts in of_classes.items()
    }
    if num_classes is not None and not classes:
        return (
            "the file has no classifier, got the backbone of a detector or segmenter; give a classification checkpoint"
        )
    if len(set(classes.values())) > 1:
        return f"the parts of the head must have one number of classes, got {classes}; fetch the file again"
    for found in set(classes.values()) - {num_classes}:
        if num_classes is not None:
            return (
                f"the file must have {num_classes} classes, got {found}; fine-tune it, or evaluate it on data with "
                f"{found} classes"
            )
    return ""


def classes_of(weights: Mapping[str, Tensor]) -> int | None:
    """For how many classes weights under our names are; None for those that know none."""
    return next((len(value) - _besides(name) for name, value in weights.items() if is_of_classes(name)), None)


def is_of_classes(mine: str) -> bool:
    """Whether the rows of one of our weights are classes: a classifier, or the labels that a DiT is given."""
    return _besides(mine) is not None


def _besides(mine: str) -> int | None:
    """Rows of a weight besides one for each class; None where the rows are no classes."""
    return next((besides for start, besides in CLASSES if mine.startswith(start)), None)


def advice(state: dict[str, Tensor], name: str) -> str:
    """Which other model of the family the weights are of."""
    family = name.partition("_")[0]
    rows, values = families.models(), sum(value.numel() for value in state.values())
    others = [other for other in list_models() if other.partition("_")[0] == family and other != name]
    # of about as many parameters: to look closely at every model takes seconds
    others = [other for other in others if values / 2 < rows[other]["counted"].get("parameters", values) < 2 * values]
    fitting = [other for other in others if _fits(other, state)]
    if fitting:
        return f"it holds {' or '.join(fitting)}"
    return "give the model, and the settings, that the file was saved from"


def _fits(name: str, state: dict[str, Tensor]) -> bool:
    table = best(tables(name, {}), state)
    return not problem_of(table, learned(table, state), name)


def some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
