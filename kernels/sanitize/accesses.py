"""The loads and stores of one launch, and what is wrong with them on a device whose programs and threads are parallel.

Programs have no order, so a place that two of them store to, or that one stores to and another reads, is a race. The
threads of a program have an order only across a barrier; a thread sees what it stored itself, and the cell of a tile
counts as the same thread where the tile has the same shape.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

OUTSIDE_LOAD = "reads outside of the tensor"
OUTSIDE_STORE = "stores outside of the tensor"
UNFILLED = "masked load without other"
ATOMIC = "atomic operation"
STORED_BY_MORE = "two programs store different values to one place"
STORED_ALIKE = "two programs store the same value to one place"
STORED_TWICE = "threads of a program store to one place"
READ_FROM_ANOTHER = "reads what another program stores"
READ_TOO_EARLY = "reads what the program stored, with no barrier between"
OVERWRITTEN = "stores to what another thread of the program read, with no barrier between"


class Finding(NamedTuple):
    """What is wrong with accesses to an argument of a kernel, and how often."""

    kernel: str
    tensor: str
    kind: str
    count: int

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind} ({self.tensor}, {self.count} times)"


class Memory:
    """Where the elements of a tensor are: exactly, unless they overlap."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.name, self.storage = name, tensor.untyped_storage().data_ptr()
        self.first, self.width = tensor.data_ptr(), tensor.element_size()
        steps = {(step * self.width, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True)}
        self.steps = sorted((pair for pair in steps if pair[0] and pair[1] > 1), reverse=True) if tensor.numel() else []
        self.empty = not tensor.numel()
        nested = all(size * step <= outer for (outer, _), (step, size) in zip(self.steps, self.steps[1:], strict=False))
        if not nested:
            self.steps = [(self.width, 1 + sum((size - 1) * step for step, size in self.steps) // self.width)]

    def holds(self, places: np.ndarray, width: int) -> np.ndarray:
        """Of addresses: whether an element of `width` bytes is there."""
        rest = places.astype(np.int64) - self.first
        inside = (rest >= 0) & (not self.empty) & (width == self.width)
        for step, size in self.steps:
            index = rest // step
            inside &= index < size
            rest = rest - index * step
        return inside & (rest == 0)


class Access(NamedTuple):
    """A load or store of one program.

    memory: the argument.
    program: its number.
    barriers: how many it has passed.
    shape: number of the shape of the tile.
    places: addresses.
    cells: of the tile, one for each address.
    bits: what was stored; None for a load.
    """

    memory: Memory
    program: int
    barriers: int
    shape: int
    places: np.ndarray
    cells: np.ndarray
    bits: np.ndarray | None = None


class Launch:
    """Collects the accesses of a launch in the order in which the interpreter makes them."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.accesses: list[Access] = []
        self.found: Counter[tuple[str, str]] = Counter()
        self._shapes: dict[tuple[int, ...], int] = {}

    def shape(self, shape: tuple[int, ...]) -> int:
        return self._shapes.setdefault(shape, len(self._shapes))

    def note(self, tensor: str, kind: str, count: int = 1) -> None:
        if count:
            self.found[tensor, kind] += int(count)

    def add(self, access: Access, width: int) -> None:
        outside = int((~access.memory.holds(access.places, width)).sum())
        self.note(access.memory.name, OUTSIDE_LOAD if access.bits is None else OUTSIDE_STORE, outside)
        self.accesses.append(access)

    def findings(self) -> list[Finding]:
        """All of them, once the launch is over."""
        stores = _Table(self.accesses, lambda access: access.bits is not None)
        if len(stores.places):
            stored = {self.accesses[i].memory.storage for i in np.unique(stores.access)}
            loads = _Table(self.accesses, lambda access: access.bits is None and access.memory.storage in stored)
            mixed = self._judge_stores(stores)
            self._judge_loads(loads, stores, mixed)
        return [Finding(self.kernel, tensor, kind, count) for (tensor, kind), count in self.found.items()]

    def _judge_stores(self, stores: "_Table") -> np.ndarray:
        """Of every store: whether different values go to its place."""
        group = np.cumsum(np.concatenate([[0], stores.places[1:] != stores.places[:-1]]))
        first = np.unique(group, return_index=True)[1]
        mixed = (np.bincount(group, stores.bits != stores.bits[first[group]]) > 0)[group]
        here, before = slice(1, None), slice(None, -1)
        again = group[here] == group[before]
        others = again & (stores.program[here] != stores.program[before])
        same_thread = _same_thread(stores, here, stores, before)
        together = (stores.barriers[here] == stores.barriers[before]) & ~same_thread
        self._note_all(STORED_BY_MORE, stores.access[here][others & mixed[here]])
        self._note_all(STORED_ALIKE, stores.access[here][others & ~mixed[here]])
        self._note_all(STORED_TWICE, stores.access[here][again & ~others & together])
        return mixed

    def _judge_loads(self, loads: "_Table", stores: "_Table", mixed: np.ndarray) -> None:
        first, last = (np.searchsorted(stores.places, loads.places, side) for side in ("left", "right"))
        load = np.repeat(np.arange(len(first)), last - first)
        store = np.arange(len(load)) - np.repeat(np.cumsum(last - first) - last, last - first)
        mine = loads.program[load] == stores.program[store]
        earlier = mine & (stores.access[store] < loads.access[load])
        together = mine & (loads.barriers[load] == stores.barriers[store])
        # what the program stored itself is there, whoever else stores the same
        there = (np.bincount(load, earlier, len(first)) > 0)[load] & ~mixed[store]
        same_thread = _same_thread(loads, load, stores, store)
        self._note_all(READ_FROM_ANOTHER, loads.access[load][~mine & ~there])
        self._note_all(READ_TOO_EARLY, loads.access[load][earlier & together])
        self._note_all(OVERWRITTEN, stores.access[store][together & ~earlier & ~same_thread])

    def _note_all(self, kind: str, accesses: np.ndarray) -> None:
        for access, count in zip(*np.unique(accesses, return_counts=True), strict=True):
            self.note(self.accesses[access].memory.name, kind, count)


class _Table:
    """Accesses that are `wanted`, an element a row, ordered by place, program and time."""

    def __init__(self, accesses: list[Access], wanted: Callable[[Access], bool]) -> None:
        chosen = [(i, access) for i, access in enumerate(accesses) if wanted(access)]
        sizes = [len(access.places) for _, access in chosen]
        self.places = _joined([access.places for _, access in chosen])
        self.cells = _joined([access.cells for _, access in chosen])
        self.bits = _joined([access.bits for _, access in chosen if access.bits is not None])
        columns = [(i, access.program, access.barriers, access.shape) for i, access in chosen]
        columns = np.repeat(np.array(columns, np.int64).reshape(-1, 4), sizes, axis=0).T
        self.access, self.program, self.barriers, self.shape = columns
        order = np.lexsort((self.access, self.program, self.places))
        for name, column in list(vars(self).items()):
            if len(column):
                setattr(self, name, column[order])


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([a.astype(np.uint64) for a in arrays]) if arrays else np.empty(0, np.uint64)


def _same_thread(one: _Table, rows, other: _Table, other_rows) -> np.ndarray:
    """Whether it is the same cell of a tile of the same shape."""
    return (one.shape[rows] == other.shape[other_rows]) & (one.cells[rows] == other.cells[other_rows])
