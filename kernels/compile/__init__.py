"""Compiles the kernels ahead of time, on any machine, and prints what they take of a multiprocessor.

    python -m kernels.compile                              every operation for sm_80 and sm_90, in bfloat16
    python -m kernels.compile agent_attention --target sm_90 --dtype float32 --quick
    python -m kernels.compile agent_attention --record     writes its rows of the table anew; without a name all rows
    python -m kernels.compile --models davit_base          what whole steps launch, down to the machine code

Nothing is listed by hand: the operations run on fake tensors of the benchmark's shapes, and every launch is recorded
and compiled as it stands. What a compiler makes of a kernel is judged in two ways. tests/kernels/compiled.json has what
one version of Triton makes of the first shape of each operation, and that version must make the same of it. Any version
must stay within what every chip has: 99 KB of shared memory for a program (sm_86 and sm_89 have no more), 255 registers
for a thread, and at most 256 bytes of them spilled. Exit status 1 if a kernel does not. `--models`: see
kernels/evidence; with `--record`, steps.json and known_faults.json are written.
"""

import argparse
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import kernels
from kernels.evidence import caps, command
from kernels.launches import Resources, launches, resources
from kernels.operation import Operation

SHARED_LIMIT, REGISTER_LIMIT, SPILL_LIMIT = 99 * 1024, 255, 256
TARGETS = ("sm_80", "sm_90")
RECORDED = Path(__file__).parents[2] / "tests" / "kernels" / "compiled.json"


class Row(NamedTuple):
    """A launch, compiled; `place` tells launches of one kernel on one shape apart."""

    operation: str
    kernel: str
    place: int
    target: str
    shape: str
    found: Resources

    @property
    def key(self) -> str:
        return f"{self.operation} {self.kernel} {self.place} {self.target} {self.shape}"


def compiled(operation: Operation, stages: list[str], dtype: torch.dtype, targets: Iterable[str]) -> Iterator[Row]:
    """Every launch of these stages for every target."""
    places: dict[tuple[str, str], int] = {}
    for launch, stage in launches(operation, stages, dtype).items():
        name = launch.kernel.__name__
        place = places[name, stage] = places.get((name, stage), 0) + 1
        for target in targets:
            yield Row(operation.name, name, place, target, stage, resources(launch, target))


def problem_of(row: Row, table: dict | None) -> tuple[str, bool]:
    """What there is to say about a row, "" if nothing, and whether that is a failure.

    Args:
        row: what was compiled.
        table: what was recorded, where this row should be among it; None where not.
    """
    import triton

    registers, spilled, shared, _ = row.found
    if shared > SHARED_LIMIT or registers > REGISTER_LIMIT or spilled > SPILL_LIMIT:
        return "does not fit", True
    if table is None:
        return "", False
    recorded = table["rows"].get(row.key)
    if recorded == list(row.found):
        return "", False
    note = f"recorded: {' '.join(map(str, recorded))}" if recorded else "not recorded"
    return f"{note}, with Triton {table['triton']}", triton.__version__ == table["triton"]


def record(rows: list[Row], operations: list[str]) -> None:
    """Replaces what the table says of these operations; of all, if another version of Triton made it."""
    import triton

    old = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    others = {o.name for name in kernels.OPERATIONS for o in kernels.operations_of(name)}.difference(operations)
    kept = old["rows"] if old.get("triton") == triton.__version__ else {}
    entries = {key: value for key, value in kept.items() if key.partition(" ")[0] in others}
    entries |= {row.key: list(row.found) for row in rows}
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
    head = f'"triton": "{triton.__version__}",\n  "columns": {json.dumps(Resources._fields)}'
    RECORDED.write_text(f'{{\n  {head},\n  "rows": {{\n{lines}\n  }}\n}}\n')


def arguments_of(line: list[str] | None) -> argparse.Namespace:
    """The command line; wrong names are one error."""
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__.partition("\n")[0])
    parser.add_argument("operations", nargs="*", help="names; all without any")
    parser.add_argument(
        "--target", action="append", help="sm_80, sm_90 ...; may be repeated; both of these without any"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quick", action="store_true", help="only the first of each operation's shapes")
    parser.add_argument("--record", action="store_true", help=f"as --quick, and write {RECORDED.name} anew")
    command.add_arguments(parser)
    chosen = parser.parse_args(line)
    for target in chosen.target or ():
        if not re.fullmatch(r"sm_\d+", target):
            parser.error(f"--target must be like sm_90, got {target}")
    if chosen.models is not None:
        return _of_models(parser, chosen)
    if chosen.record and (chosen.target or chosen.dtype != "bfloat16"):
        parser.error("--record is for sm_80 and sm_90 in bfloat16, got another --target or --dtype; leave them out")
    try:
        chosen.operations = [o for name in chosen.operations or kernels.OPERATIONS for o in kernels.operations_of(name)]
    except ValueError as error:
        parser.error(str(error))
    chosen.quick |= chosen.record
    return chosen


def _of_models(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> argparse.Namespace:
    """The command line with `--models`: no operations, and models that exist."""
    if chosen.operations or chosen.quick or chosen.dtype != "bfloat16":
        parser.error("--models takes no operations, --quick or --dtype: its steps run under autocast; leave them out")
    try:
        command.check_names(chosen.models, chosen.target or ())
    except ValueError as error:
        parser.error(str(error))
    return chosen


def main(line: list[str] | None = None) -> int:
    """Prints one row per kernel; 1 if one of them does not fit, or is not what was recorded of it."""
    os.environ.pop("TRITON_INTERPRET", None)  # before kernels are defined
    chosen = arguments_of(line)
    if chosen.models is not None:
        return command.main(chosen)
    if chosen.caps:
        caps.write(chosen.operations, chosen.quick)
        return 0
    comparable = chosen.quick and chosen.dtype == "bfloat16" and not chosen.record and RECORDED.exists()
    table = json.loads(RECORDED.read_text()) if comparable else None
    shown = "{:24} {:18} {:7} {:>9} {:>7} {:>9} {:6} {}".format
    print(shown("operation", "kernel", "target", "registers", "spilled", "shared KB", "cores", "shape"))
    rows, failed = [], False
    for operation in chosen.operations:
        stages = list(operation.stages)[: 1 if chosen.quick else None]
        for row in compiled(operation, stages, getattr(torch, chosen.dtype), chosen.target or TARGETS):
            registers, spilled, shared, cores = row.found
            note, fails = problem_of(row, table if row.target in TARGETS else None)
            numbers = registers, spilled, f"{shared / 1024:.1f}", cores
            shape = f"{row.shape}   <- {note}" if note else row.shape
            print(shown(row.operation, row.kernel, row.target, *numbers, shape), flush=True)
            rows.append(row)
            failed |= fails
    if chosen.record:
        record(rows, [operation.name for operation in chosen.operations])
    return int(failed)
