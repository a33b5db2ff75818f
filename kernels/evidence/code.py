"""A launch, compiled and read: what it takes of a multiprocessor, and what its loops are made of."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

from kernels.evidence import chips, machine_code, trips
from kernels.evidence.machine_code import Instruction, Where
from kernels.launches import Launch, compiled, tensor_cores

TILE_OF_HALVES = re.compile(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr<b?f16>>")


@dataclass(frozen=True)
class Loop:
    """Without what loops inside of it have. `unrolled`: iterations of the source that are one of the machine's."""

    where: Where
    instructions: int
    barriers: int
    products: int
    unrolled: int
    remainder: bool


@dataclass(frozen=True)
class Code:
    """What was made of a launch for a target; `straight` are the places of instructions outside of loops."""

    registers: int
    spilled: int
    shared: int
    blocks: int
    tensor_cores: str
    load_bytes: tuple[int, ...]  # widths of loads from global memory, one per instruction
    narrow: int
    loops: tuple[Loop, ...]
    straight: Counter[Where]
    ir: str

    @property
    def load_width(self) -> float:
        """Mean bytes of a thread's load."""
        return sum(self.load_bytes) / len(self.load_bytes) if self.load_bytes else 0.0

    @property
    def idle_barriers(self) -> int:
        """Barriers in loops that have no matrix product, not even in a loop inside: what they wait for is a layout."""
        return sum(loop.barriers for loop in self.loops if loop.barriers and not loop.products)


@cache
def code_of(launch: Launch, target: str) -> Code:
    """Compiles, and reads the machine code."""
    made = compiled(launch, target)
    registers, spilled = machine_code.resources_of(made.asm["cubin"])
    code = machine_code.disassembled(made.asm["cubin"])
    loops = machine_code.loops_of(code)
    inside = {i.address for loop in loops for i in loop.all}
    loads = [i for i in code if i.kind == "load"]
    return Code(
        registers=registers,
        spilled=spilled,
        shared=made.metadata.shared,
        blocks=chips.blocks(target, registers, launch.warps, made.metadata.shared),
        tensor_cores=tensor_cores(made.asm["ptx"]),
        load_bytes=tuple(machine_code.width(i) for i in loads if not i.name.startswith(("UBLKCP", "UTMA"))),
        narrow=_narrow(code, made.asm["ttir"]),
        loops=_loops(loops, trips.loops_in(made.asm["ttir"])),
        straight=Counter(i.where for i in code if i.address not in inside and i.name != "NOP"),
        ir=made.asm["ttir"],
    )


def _loops(loops: list[machine_code.Loop], places: set[Where]) -> tuple[Loop, ...]:
    """With how far each was unrolled: of two loops of one place, the smaller does what the larger leaves."""
    where_of = {loop.first: _where(loop, places) for loop in loops}
    found = []
    for loop in loops:
        where, barriers = where_of[loop.first], machine_code.mix(loop.own)["barrier"]
        same = [other for other in loops if where_of[other.first] == where]
        least = min(same, key=lambda other: len(other.own))
        products = machine_code.mix(loop.all)["product"]
        unrolled = _nearest_power(_work(loop), _work(least)) if len(same) > 1 else 1
        remainder = len(same) > 1 and loop is least
        found.append(Loop(where, len(loop.own), barriers, products, unrolled, remainder))
    return tuple(found)


def _where(loop: machine_code.Loop, places: set[Where]) -> Where:
    """Which of the loops of the source it is: that of its branch, or of most that counts and compares in it."""
    if loop.own[-1].where in places:
        return loop.own[-1].where
    named = Counter(i.where for i in loop.own if i.where in places)
    return named.most_common(1)[0][0] if named else loop.own[-1].where


def _work(loop: machine_code.Loop) -> int:
    """What is repeated when a loop is unrolled, as counters are not."""
    kinds = machine_code.mix(loop.own)
    return kinds["load"] + kinds["store"] + kinds["product"] or len(loop.own)


def _nearest_power(large: int, small: int) -> int:
    return 1 << max(0, round(large / max(small, 1)) - 1).bit_length()


def _narrow(code: list[Instruction], ir: str) -> int:
    """Loads of one or two bytes by a thread, of tiles of 16-bit numbers; not of a row of them, which a warp shares."""
    tiles = trips.places_of(ir, TILE_OF_HALVES)
    return sum(i.kind == "load" and machine_code.width(i) <= 2 and i.where in tiles for i in code)
