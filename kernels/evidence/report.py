"""What a step's launches take, as rows: to be printed, or as data."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from kernels.evidence.chips import CHIPS, Chip
from kernels.evidence.code import Code, code_of
from kernels.evidence.roof import floors_of
from kernels.evidence.steps import Recorded, Step


@dataclass(frozen=True)
class Row:
    """A launch of a step, `times` times: what its code is, and for each chip of its target the floors and a prediction.

    load_bytes: mean width of a thread's loads. loops: instructions of each, and its barriers. cap: share of the
    bandwidth that is left at full issue; share: that is predicted. assumed: a loop is as long as is assumed.
    """

    operation: str
    kernel: str
    times: int
    warps: int
    grid: tuple[int, ...]
    sizes: dict[str, int]
    registers: int
    blocks: int
    spilled: int
    shared: int
    tensor_cores: str
    load_bytes: float
    narrow_loads: int
    idle_barriers: int
    loops: list[tuple[int, int]]
    megabytes: float
    assumed: bool
    chips: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Read:
    """A step, compiled for a target; `milliseconds` by operation and chip; `outside` in gigabytes and kernels."""

    name: str
    target: str
    launches: int
    variants: int
    milliseconds: dict[str, dict[str, float]]
    outside: dict[str, tuple[float, int]]
    rows: list[Row]

    def total(self, chip: str) -> float:
        """Milliseconds predicted of our kernels."""
        return sum(of[chip] for of in self.milliseconds.values())


SIZES = ("B", "H", "W", "N", "C", "M", "D", "K", "G", "h", "w", "WINDOW", "WH", "A", "P", "BM", "BN", "BT", "BX", "BC")


def read(step: Step, target: str) -> Read:
    """Compiles and reads all launches of a step."""
    here = {name: chip for name, chip in CHIPS.items() if chip.target == target}
    rows = [_row(launch, times, target, here) for launch, times in step.launches.items()]
    rows.sort(key=lambda row: -max((row.times * of["predicted us"] for of in row.chips.values()), default=0.0))
    milliseconds: dict[str, dict[str, float]] = {}
    for row in rows:
        totals = milliseconds.setdefault(f"{row.operation} {row.kernel}", dict.fromkeys(here, 0.0))
        for name, of in row.chips.items():
            totals[name] += row.times * of["predicted us"] / 1e3
    outside = {name: (size / 1e9, kernels) for name, (size, kernels) in step.outside.items() if kernels}
    launches = sum(step.launches.values())
    return Read(step.name, target, launches, len(step.variants()), milliseconds, outside, rows)


def _row(launch: Recorded, times: int, target: str, here: dict[str, Chip]) -> Row:
    code = code_of(launch.launch, target)
    floors = {name: floors_of(launch, chip) for name, chip in here.items()}
    operation, kernel = launch.operation.split()
    numbers = dict(launch.numbers)
    return Row(
        operation, kernel, times, launch.launch.warps, launch.grid,
        {name: numbers[name] for name in SIZES if name in numbers},
        code.registers, code.blocks, code.spilled, code.shared, code.tensor_cores,
        round(code.load_width, 1), code.narrow, code.idle_barriers, _loops(code), launch.bytes / 1e6,
        any(f.assumed for f in floors.values()),
        {
            name: {
                "dram us": f.dram * 1e6, "issue us": f.issue * 1e6, "predicted us": f.predicted * 1e6,
                "cap": f.cap, "share": f.share,
            }
            for name, f in floors.items()
        },
    )  # fmt: skip


def _loops(code: Code) -> list[tuple[int, int]]:
    return [(loop.instructions, loop.barriers) for loop in code.loops]


def as_dict(found: Read) -> dict:
    """Plain data."""
    totals = {name: found.total(name) for name, chip in CHIPS.items() if chip.target == found.target}
    return asdict(found) | {"total ms": totals}


def text(found: Read) -> Iterator[str]:
    """Lines for a terminal: one per launch, then what the step takes."""
    yield f"\n{found.name}, {found.target}: {found.launches} launches of {found.variants} variants"
    names = list(next((row.chips for row in found.rows), {}))
    shown = "{:44} {:>5} {:>4} {:>6} {:>5} {:>7} {:5} {:>5} {:>6} {:16} {}".format
    chips = "   ".join(f"{name}: DRAM + issue -> us, share" for name in names)
    head = "kernel", "times", "regs", "blocks", "spill", "shared", "cores", "loadB", "narrow", "loops:barriers"
    yield shown(*head, chips)
    for row in found.rows:
        loops = " ".join(f"{n}:{barriers}" for n, barriers in row.loops) or "-"
        of = "   ".join(_floors(row.chips[name]) for name in names) + (" (a length is assumed)" if row.assumed else "")
        yield shown(
            f"{row.operation} {row.kernel}", row.times, row.registers, row.blocks, row.spilled, row.shared,
            row.tensor_cores, row.load_bytes, row.narrow_loads, loops, of,
        )  # fmt: skip
    for operation, of in sorted(found.milliseconds.items(), key=lambda item: -max(item[1].values(), default=0.0)):
        yield f"  {operation:44} " + "  ".join(f"{ms:7.2f} ms {name}" for name, ms in of.items())
    yield f"  {'our kernels, predicted':44} " + "  ".join(f"{found.total(n):7.2f} ms {n}" for n in names)
    for name, (size, kernels) in found.outside.items():
        yield f"  outside, {name:35} {size:7.1f} GB in {kernels} kernels"


def _floors(of: dict[str, float]) -> str:
    return f"{of['dram us']:5.0f} + {of['issue us']:5.0f} -> {of['predicted us']:5.0f}, {of['share']:4.0%}"
