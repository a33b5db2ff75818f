"""How often a program runs each line of a kernel: loop bounds and conditions of Triton's IR, worked out with numbers.

The scalars of the IR follow from the arguments of a launch and the number of the program. What follows from memory (a
list of routes, the length of a list) is unknown: such a loop is as long as is `assumed`, and of an unknown condition
both ways count half.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kernels.evidence.machine_code import Where, below_root

SAMPLES, SPREAD = 64, (5**0.5 - 1) / 2  # programs of a launch that are worked out; in no step with any period

OPERATIONS: dict[str, Callable[..., int]] = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: int(a / b) if b else None,
    "divui": lambda a, b: a // b if b else None,
    "remsi": lambda a, b: a - int(a / b) * b if b else None,
    "remui": lambda a, b: a % b if b else None,
    "ceildivsi": lambda a, b: -(-a // b) if b else None,
    "minsi": min, "maxsi": max, "minui": min, "maxui": max,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "xori": lambda a, b: a ^ b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
    "shrui": lambda a, b: a >> b,
    "extsi": lambda a: a, "extui": lambda a: a, "trunci": lambda a: a, "index_cast": lambda a: a,
    "select": lambda c, a, b: a if c else b,
}  # fmt: skip
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip

VALUE = re.compile(r"%[\w.#]+")
ASSIGNED = re.compile(r"^(%[\w.]+)(?::\d+)? = (.*)$")
FOR = re.compile(r"scf\.for (%[\w.]+) = (%[\w.#]+) to (%[\w.#]+) step (%[\w.#]+)(?: iter_args\((.*?)\) ->)?")
LOCATION = re.compile(r"loc\((#loc\d*|unknown|callsite\(.*\)|\".*\")\)\s*$")


class Statement(NamedTuple):
    """A line of the IR; `blocks` are the lines inside of its braces."""

    text: str
    where: Where
    blocks: tuple[tuple["Statement", ...], ...]


class Trips(NamedTuple):
    """How often a program runs the body of the loop at a place, the statements of a place, and what was assumed."""

    loops: dict[Where, float]
    lines: dict[Where, float]
    unknown: frozenset[Where]


def trips_of(ir: str, arguments: dict[str, Any], grid: tuple[int, ...], assumed: Callable[[], float]) -> Trips:
    """Means over the programs of a launch.

    Args:
        ir: Triton's IR of the kernel.
        arguments: its scalar arguments by name.
        grid: programs along each axis.
        assumed: the length of a loop whose bounds are in memory.
    """
    body, walk = statements(ir), Walk(arguments, grid, assumed)
    programs = 1
    for size in grid:
        programs *= size
    chosen = (int(i * SPREAD % 1 * programs) for i in range(SAMPLES))
    numbers = list(chosen if programs > SAMPLES else range(programs))
    for number in numbers:
        walk.program(body, number)

    def mean(totals: dict[Where, float]) -> dict[Where, float]:
        return {where: total / len(numbers) for where, total in totals.items()}

    return Trips(mean(walk.loops), mean(walk.lines), frozenset(walk.unknown))


class Walk:
    """One program after another, through the statements."""

    def __init__(self, arguments: dict[str, Any], grid: tuple[int, ...], assumed: Callable[[], float]) -> None:
        self.arguments, self.assumed = arguments, assumed
        self.grid = (*grid, 1, 1)[:3]
        self.loops: dict[Where, float] = defaultdict(float)
        self.lines: dict[Where, float] = defaultdict(float)
        self.unknown: set[Where] = set()

    def program(self, body: tuple[Statement, ...], number: int) -> None:
        x, y, _ = self.grid
        self.ids = {"x": number % x, "y": number // x % y, "z": number // (x * y)}
        self.values = {f"%{name}": int(v) for name, v in self.arguments.items() if isinstance(v, int)}
        self.counted: dict[Where, float] = {}
        self._block(body, 1.0)
        for where, weight in self.counted.items():
            self.lines[where] += weight

    def _block(self, block: tuple[Statement, ...], weight: float) -> list[int | None]:
        """Runs the statements, and gives what they yield."""
        for statement in block:
            text = statement.text
            self.counted[statement.where] = max(self.counted.get(statement.where, 0.0), weight)
            if text.startswith(("scf.yield", "scf.yield ")):
                return [self._value(v) for v in VALUE.findall(text.partition(" : ")[0])]
            name, _, expression = text.partition(" = ") if ASSIGNED.match(text) else ("", "", text)
            if expression.startswith("scf.for"):
                self._loop(statement, expression, weight)
            elif expression.startswith("scf.if"):
                self._choice(statement, name, expression, weight)
            elif name and "tensor<" not in expression and "!tt.ptr" not in expression:
                self.values[name.partition(":")[0]] = self._evaluated(expression)
        return []

    def _loop(self, statement: Statement, expression: str, weight: float) -> None:
        variable, *bounds, carried = FOR.match(expression).groups()
        first, last, step = (self._value(b) for b in bounds)
        for name in re.findall(r"(%[\w.]+) =", carried or ""):
            self.values[name] = None
        if None in (first, last, step) or step <= 0:
            count = self.assumed() / (step or 1)
            self.unknown.add(statement.where)
        else:
            count = max(0, -(-(last - first) // step))
        self.loops[statement.where] += weight * count
        if count:
            self.values[variable] = None if first is None or step is None else first + step * int(count // 2)
            self._block(statement.blocks[0], weight * count)

    def _choice(self, statement: Statement, name: str, expression: str, weight: float) -> None:
        condition = self._value(VALUE.findall(expression)[0])
        if condition is None:
            for block in statement.blocks:
                self._block(block, weight / 2)
            return
        taken = statement.blocks[0 if condition else 1 : 1 if condition else 2]
        results = self._block(taken[0], weight) if taken else []
        base = name.partition(":")[0]
        for i, value in enumerate(results):
            self.values[f"{base}#{i}"] = value
        if len(results) == 1:
            self.values[base] = results[0]

    def _value(self, name: str) -> int | None:
        return self.values.get(name)

    def _evaluated(self, expression: str) -> int | None:
        operation, _, rest = expression.partition(" ")
        if operation == "arith.constant":
            word = rest.split()[0]
            return {"true": 1, "false": 0}.get(word, int(word) if re.fullmatch(r"-?\d+", word) else None)
        if operation in ("tt.get_program_id", "tt.get_num_programs"):
            axis = rest.split()[0]
            return self.ids[axis] if operation.endswith("id") else self.grid["xyz".index(axis)]
        operands = [self._value(v) for v in VALUE.findall(rest.partition(" : ")[0])]
        if None in operands:
            return None
        if operation == "arith.cmpi":
            return int(COMPARISONS[rest.split(",")[0].lstrip("su")](*operands))
        compute = OPERATIONS.get(operation.removeprefix("arith."))
        return compute(*operands) if compute and operation.startswith("arith.") else None


def places_of(ir: str, pattern: re.Pattern) -> set[Where]:
    """Where the lines of the IR come from that match."""
    places = _places(ir)
    return {_place(line.strip(), places) for line in ir.splitlines() if pattern.search(line)}


def loops_in(ir: str) -> set[Where]:
    """Where its loops come from."""

    def found(block: tuple[Statement, ...]) -> Iterator[Where]:
        for statement in block:
            if "scf.for " in statement.text:
                yield statement.where
            for inside in statement.blocks:
                yield from found(inside)

    return set(found(statements(ir)))


def statements(ir: str) -> tuple[Statement, ...]:
    """The body of the one function of a module, as a tree."""
    places = _places(ir)
    lines = iter(ir.splitlines())
    for line in lines:
        if line.strip().startswith("tt.func"):
            return _nested(lines, places)[0][0]
    raise ValueError(f"trips: Triton's IR must have a function, got {ir[:60]!r}; was it compiled?")


def _nested(lines: Iterator[str], places: dict[str, Where]) -> tuple[list[tuple[Statement, ...]], Where]:
    """The blocks up to the brace that closes them, and the place that stands behind it."""
    blocks: list[tuple[Statement, ...]] = []
    block: list[Statement] = []
    for line in lines:
        text = line.strip()
        if text.startswith("}"):
            blocks.append(tuple(block))
            if not text.startswith("} else"):
                return blocks, _place(text, places)
            block = []
        elif text.endswith("{"):
            inside, where = _nested(lines, places)
            block.append(Statement(text, where, tuple(inside)))
        elif text and not text.startswith("^"):
            block.append(Statement(text, _place(text, places), ()))
    return [tuple(block)], ()


def _place(text: str, places: dict[str, Where]) -> Where:
    found = LOCATION.search(text)
    return places.get(found[1], ()) if found else ()


def _places(ir: str) -> dict[str, Where]:
    """What the numbers of places stand for."""
    written = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ir, re.MULTILINE))
    known: dict[str, Where] = {}

    def resolved(name: str) -> Where:
        if name not in known:
            known[name] = ()
            text = written.get(name, name)
            if call := re.fullmatch(r"callsite\((\S+) at (\S+)\)", text):
                known[name] = resolved(call[1]) + resolved(call[2])
            elif file := re.fullmatch(r'"([^"]+)":(\d+):\d+', text):
                known[name] = ((below_root(file[1]), int(file[2])),)
            elif named := re.fullmatch(r'".*"\((#loc\d*)\)', text):
                known[name] = resolved(named[1])
        return known[name]

    return {name: resolved(name) for name in written}
