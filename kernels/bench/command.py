"""Checks and times every fused operation, or whole models; without a GPU, counts bytes, memory and launches.

    python -m kernels.bench                                    every operation at every stage, in bfloat16
    python -m kernels.bench window_attention --stage "224 px" --no-compile --budget 540
    python -m kernels.bench --model swin_tiny,davit_base --compile

With a GPU: checks, times, and writes dated tables to kernels/benchmarks/. Without one: counts bytes, memory and kernels
from the graphs, and writes only to a folder that is named. Exit status 1 if a check failed, 2 for a wrong argument.
"""

import argparse
from pathlib import Path

import torch

import kernels
from kernels.bench import models
from kernels.bench.environment import Budget, environment
from kernels.bench.report import Report, counted_table, timed_table
from kernels.bench.rows import Row, counted_row, timed_row
from kernels.bench.timing import CudaTimer, Timer, calibrate
from kernels.operation import Operation

FOLDER = Path(__file__).parents[1] / "benchmarks"


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; 1 if a check failed."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if chosen.operations and chosen.model:
        parser.error("kernels.bench: takes operations or --model, got both; give one of them")
    try:
        work = [] if chosen.model else _stages(chosen)
        names = models.checked_names(chosen.model, chosen.attention) if chosen.model else []
    except ValueError as error:
        parser.error(str(error))
    budget, timer = Budget(chosen.budget), CudaTimer() if gpu else None
    ceilings = calibrate(timer) if gpu and work else None
    report = Report(environment(), ceilings, chosen.output or (FOLDER if gpu else None))
    if not gpu:
        report.remarks.append("no GPU: kernels are not timed, bytes and launches are counted from the graphs")
    print(report.markdown(), flush=True)
    if names:
        models.benchmark(names, chosen, report, budget)
    else:
        _benchmark(work, chosen, report, budget, timer)
    report.write()
    if report.path is not None:
        print(f"written: {report.path}.md and .json")
    return 1 if any(row.wrong for row in report.rows) else 0


def _benchmark(
    work: list[tuple[Operation, str]],
    chosen: argparse.Namespace,
    report: Report,
    budget: Budget,
    timer: Timer | None,
) -> None:
    """A row for each, printed and kept at once, until the budget is spent."""
    dtype, last = getattr(torch, chosen.dtype), None
    for i, (operation, stage) in enumerate(work):
        if budget.spent():
            report.remarks.append(f"the budget of {chosen.budget:g} s was spent; left out: {_left_out(work[i:])}")
            print(report.remarks[-1])
            return
        if timer is None:
            row = counted_row(operation, stage, dtype)
        else:
            row = timed_row(operation, stage, dtype, timer, compiled=not chosen.no_compile)
        report.add(row)
        _show(row, report, heading=operation.name != last)
        last = operation.name


def _show(row: Row, report: Report, heading: bool) -> None:
    lines = timed_table([row], report.ceilings) if report.ceilings else counted_table([row])
    if heading:
        print("\n".join(["", f"## {row.operation} ({row.dtype})", "", *lines[:2]]))
    print(lines[2], flush=True)


def _left_out(work: list[tuple[Operation, str]]) -> str:
    return "; ".join(f"{operation.name}, {stage}" for operation, stage in work)


def _stages(chosen: argparse.Namespace) -> list[tuple[Operation, str]]:
    """What was asked for.

    Raises:
        ValueError: an unknown operation, or no stage with that text in its name.
    """
    operations = [o for name in chosen.operations or kernels.OPERATIONS for o in kernels.operations_of(name)]
    found = [(o, s) for o in operations for s in o.stages if chosen.stage in s]
    if not found:
        names = dict.fromkeys(s for o in operations for s in o.stages)
        raise ValueError(f"--stage: no stage has this in its name, got {chosen.stage}; choose from {', '.join(names)}")
    firsts = {o.name: (o, s) for o, s in reversed(found)}
    return [firsts[name] for name in dict.fromkeys(o.name for o, _ in found)] if chosen.quick else found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("operations", nargs="*", help="modules of kernels/; all without any")
    parser.add_argument("--stage", default="", metavar="TEXT", help="only stages with this in their name")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--quick", action="store_true", help="only the first stage of each operation")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out the authors' way under torch.compile: minutes"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the tables; kernels/benchmarks with a GPU")
    parser.add_argument("--budget", type=_positive, metavar="SECONDS", help="start nothing more after this time")
    models.add_arguments(parser)
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value
