"""How the weights of a model are named in somebody else's files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from conf.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]


class Part(NamedTuple):
    """One weight of theirs: all of one of ours, or a share of its rows."""

    name: str
    share: int = 1  # of `of` equal shares
    of: int = 1


@dataclass(frozen=True)
class Joined:
    """Weights that are separate there and one here, row after row, such as queries and keys with values.

    Attributes:
        pattern: in the name that the rules give.
        parts: what stands in its place there, with the number of equal shares of the rows: ((".q.", 1), (".kv.", 2)).
    """

    pattern: str
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Axes:
    """Weights with other axes there.

    Attributes:
        pattern: of their name.
        theirs: one letter per axis, in their order; a `1` is an axis of length one that ours lacks.
        ours: the same letters in our order; two in brackets are one axis here, the second one running faster: "(hw)m".
        flipped: letters of axes that run the other way there.
        last: letters of axes whose first entry here is the last one there.
    """

    pattern: str
    theirs: str
    ours: str
    flipped: str = ""
    last: str = ""

    def take(self, value: Tensor) -> Tensor:
        """Their value as ours; as it is when it has other axes than expected."""
        if value.dim() != len(self.theirs) or any(
            side != 1 for axis, side in zip(self.theirs, value.shape, strict=True) if axis == "1"
        ):
            return value
        letters = self.theirs.replace("1", "")
        sides = [side for axis, side in zip(self.theirs, value.shape, strict=True) if axis != "1"]
        value = self._turned(value.reshape(sides), 1).permute([letters.index(axis) for axis in "".join(self._groups)])
        for place, group in enumerate(self._groups):
            value = value.flatten(place, place + 1) if len(group) == 2 else value
        return value

    def give(self, value: Tensor) -> Tensor:
        """Our value as theirs.

        Raises:
            ValueError: an axis that is two of theirs is no square.
        """
        for place, group in reversed(list(enumerate(self._groups))):
            value = value.unflatten(place, (_side(value.shape[place]),) * 2) if len(group) == 2 else value
        value = self._turned(
            value.permute(["".join(self._groups).index(axis) for axis in self.theirs if axis != "1"]), -1
        )
        for place, axis in enumerate(self.theirs):
            if axis == "1":
                value = value.unsqueeze(place)
        return value.contiguous()

    @property
    def _groups(self) -> list[str]:
        """The letters of each of our axes."""
        return [group.strip("()") for group in re.findall(r"\(\w\w\)|\w", self.ours)]

    def _turned(self, value: Tensor, back: int) -> Tensor:
        """A value with their axes, flipped, which is the same both ways, and rolled: by 1 to ours, by -1 to theirs."""
        letters = self.theirs.replace("1", "")
        for axis in self.last:
            value = value.roll(back, letters.index(axis))
        return value.flip([letters.index(axis) for axis in self.flipped]) if self.flipped else value


@dataclass(frozen=True)
class Turns:
    """Rows that take turns there, head by head, and follow each other here, such as those of keys and values.

    Attributes:
        pattern: of their name.
        parts: how many of a head follow each other there, of equally many rows.
        like: pattern and replacement of `re.sub` from our name of it to our name of a weight whose last axis has the
            channels of a head: nothing else says how many heads there are.
    """

    pattern: str
    parts: int
    like: tuple[str, str]

    def take(self, value: Tensor, head_dim: int) -> Tensor:
        """Their rows (head, part, channel) as ours (part, head, channel)."""
        return value.unflatten(0, (-1, self.parts, head_dim)).transpose(0, 1).flatten(0, 2)

    def give(self, value: Tensor, head_dim: int) -> Tensor:
        """The inverse of `take`."""
        return value.unflatten(0, (self.parts, -1, head_dim)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Layout:
    """One way to name the weights of a family of models.

    Attributes:
        source: whose names these are, for messages, e.g. "rayleizhu/BiFormer".
        rules: pairs (pattern, replacement) of `re.sub`, applied in turn to one of our names; the result is theirs.
        pointwise: pattern of those of our names whose Linear weights are 1×1 convolutions there; "" for none.
        flattened: pattern of those of our names whose kernels are matrices (out, in·height·width) there; "" for none.
        warning: what a user should know who loads such a file, by model; a model that is not named has nothing to know.
        joined: weights that are several there.
        axes: weights with other axes there.
        turns: weights whose rows are in another order there.
        numbered: whether blocks are counted through all stages there; the rules then see `blocks.K.` for them.
        constants: pattern of names in their files that hold nothing learned; "" for none.
        masks: pattern of those that hold masks of windows, which a model for another image size may not have.
        make_constants: `our weights -> ` those, to be written into files for them.
        copies: pattern and replacement of `re.sub` from names in their files to those of which they must be copies;
            None for none. A file whose copies differ is not read.
    """

    source: str
    rules: Rules = ()
    pointwise: str = ""
    flattened: str = ""
    warning: tuple[tuple[str, str], ...] = ()
    joined: tuple[Joined, ...] = ()
    axes: tuple[Axes, ...] = ()
    turns: tuple[Turns, ...] = ()
    numbered: bool = False
    constants: str = ""
    masks: str = ""
    make_constants: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    copies: tuple[str, str] | None = None

    def names(self, ours: Iterable[str]) -> dict[str, tuple[Part, ...]]:
        """Their names for each of ours, all names of a model together."""
        ours = list(ours)
        blocks = sorted({_block(name) for name in ours} - {None}) if self.numbered else []
        place = {block: place for place, block in enumerate(blocks)}
        return {name: self._parts(self._theirs(name, place)) for name in ours}

    def _theirs(self, name: str, place: dict[tuple[int, int] | None, int]) -> str:
        if (block := _block(name)) in place:
            name = re.sub(r"^stages\.\d+\.blocks\.\d+\.", f"blocks.{place[block]}.", name)
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name

    def _parts(self, name: str) -> tuple[Part, ...]:
        for joined in self.joined:
            if re.search(joined.pattern, name):
                of = sum(share for _, share in joined.parts)
                return tuple(Part(re.sub(joined.pattern, text, name), share, of) for text, share in joined.parts)
        return (Part(name),)

    def is_copy(self, name: str, state: Mapping[str, Tensor]) -> bool:
        """Whether a weight of theirs only repeats another one of the file."""
        original = re.sub(*self.copies, name) if self.copies else name
        return original != name and original in state and bool((state[name] == state[original]).all())

    def head_dim(self, mine: str, shape: Callable[[str], tuple[int, ...] | None]) -> int | None:
        """Channels of a head where a weight of ours needs them, from the shapes of others; None for most."""
        found = (shape(re.sub(*turns.like, mine)) for turns in self.turns if re.search(turns.like[0], mine))
        return next((each[-1] for each in found if each), None)

    def take(self, name: str, value: Tensor, head_dim: int | None = None) -> Tensor:
        """Their value of a name as ours, or as its rows of ours; in their order where `head_dim` is not known."""
        value = self._taken(name, value)
        for turns in self.turns if head_dim else ():
            value = turns.take(value, head_dim) if re.search(turns.pattern, name) else value
        return value

    def _taken(self, name: str, value: Tensor) -> Tensor:
        for axes in self.axes:
            if re.search(axes.pattern, name):
                return axes.take(value)
        return value.flatten(1) if self.pointwise and value.shape[2:] == (1, 1) else value

    def give(self, name: str, value: Tensor, parts: tuple[Part, ...], head_dim: int | None = None) -> dict[str, Tensor]:
        """Our value as theirs, by their names.

        Raises:
            ValueError: rows that do not divide into theirs.
        """
        if self.pointwise and value.dim() == 2 and re.search(self.pointwise, name):
            value = value[..., None, None]
        if self.flattened and re.search(self.flattened, name):
            value = value.flatten(1)
        if len(parts) == 1:
            return {parts[0].name: self._axes(parts[0].name, value)}
        if len(value) % parts[0].of:
            raise UserError(
                f"export: {parts[0].name} and {len(parts) - 1} more of theirs are one weight here with a multiple of "
                f"{parts[0].of} rows, got {len(value)}; export a model with as many classes as theirs"
            )
        split = value.split([len(value) * part.share // part.of for part in parts])
        pieces = {part.name: piece for part, piece in zip(parts, split, strict=True)}
        for turns in self.turns if head_dim else ():
            pieces |= {
                key: turns.give(piece, head_dim) for key, piece in pieces.items() if re.search(turns.pattern, key)
            }
        return {key: self._axes(key, piece) for key, piece in pieces.items()}

    def _axes(self, name: str, value: Tensor) -> Tensor:
        return next((axes.give(value) for axes in self.axes if re.search(axes.pattern, name)), value)

    def shape_of(self, part: Part, ours: torch.Size) -> tuple[int, ...]:
        """The shape that a weight of theirs must have once it is taken."""
        return tuple(ours) if part.of == 1 else (ours[0] * part.share // part.of, *ours[1:])


def _side(numbers: int) -> int:
    """The side of the square that an axis stands for."""
    side = math.isqrt(numbers)
    if side * side != numbers:
        raise UserError(
            f"export: two axes of theirs that are one here must be equally long, got {numbers} numbers, no square; "
            "choose square images and windows"
        )
    return side


def _block(name: str) -> tuple[int, int] | None:
    """Stage and block of one of our names, or None."""
    match = re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name)
    return (int(match[1]), int(match[2])) if match else None


OURS = Layout("this project")
