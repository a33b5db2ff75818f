"""Whole models: training and inference steps, fused against eager.

The models are on a floor above this folder, which must run without them. So what a step is stands in
`models.benchmark`, and this module finds it by name, and only when a model is asked for.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

import torch

from kernels import dispatch
from kernels.bench.counting import count
from kernels.bench.environment import Budget
from kernels.bench.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("whole models, instead of operations")
    group.add_argument("--model", default="", metavar="NAMES", help="names of conf/model, with commas between them")
    group.add_argument("--attention", metavar="NAME", help="a name of conf/attention; the model's own without it")
    group.add_argument("--batch", type=_count, default=128, help="images per step; 128")
    group.add_argument("--image-size", type=_count, help="pixels; the model's own without it")
    group.add_argument("--steps", type=_count, help="steps to time, after a third as many; 30. Without a GPU: none")
    group.add_argument("--compile", action="store_true", help="also under torch.compile")


def checked_names(names: str, attention: str | None) -> list[str]:
    """The names of models in a list with commas.

    Raises:
        ValueError: a model or an attention that does not exist.
    """
    zoo = import_module("models")
    for kind, given, known in [
        ("model", names.split(","), zoo.list_models()),
        ("attention", [attention] if attention else [], zoo.list_attentions()),
    ]:
        for name in given:
            if name not in known:
                raise ValueError(
                    f"--{kind}: there is no {kind} of this name, got {name}; choose from {', '.join(known)}"
                )
    return names.split(",")


def benchmark(names: list[str], chosen: argparse.Namespace, report: Report, budget: Budget) -> None:
    """Rows of the table of models: times on a GPU or where steps are asked for, counts on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for i, name in enumerate(names):
        if budget.spent():
            report.remarks.append(f"the budget of {chosen.budget:g} s was spent; left out: {', '.join(names[i:])}")
            print(report.remarks[-1])
            return
        rows = _counted(name, chosen) if device == "cpu" else []
        if device == "cuda" or chosen.steps:
            rows += _timed(name, chosen, device)
        report.models += rows
        report.write()
    print("".join(report.markdown().partition("\n## Models")[1:]))


def _steps(name: str, chosen: argparse.Namespace, device: str):
    return import_module("models.benchmark").Steps(name, chosen.attention, chosen.batch, chosen.image_size, device)


def _ways(device: str, compiled: bool) -> Iterator[tuple[str, Callable[[], AbstractContextManager], bool]]:
    """Name, context of the steps, and whether the model is compiled. Without a GPU nothing is fused."""
    fused = [("fused", nullcontext)] if device == "cuda" else []
    for compile in (False, True) if compiled else (False,):
        for name, context in (*fused, ("eager", dispatch.reference)):
            yield f"{name}, compiled" if compile else name, context, compile


def _timed(name: str, chosen: argparse.Namespace, device: str) -> list[dict]:
    steps, rows = _steps(name, chosen, device), []
    for way, context, compiled in _ways(device, chosen.compile):
        torch._dynamo.reset()
        steps.network = torch.compile(steps.model) if compiled else steps.model
        for kind in ("training", "inference"):
            with context():
                times, memory = _run(getattr(steps, kind), chosen.steps or 30, device)
            ms = statistics.median(times) * 1e3
            rows.append(
                _row(name, steps, kind, way) | {"ms": ms, "images/s": steps.batch / ms * 1e3, "memory GiB": memory}
            )
    return _with_ratios(rows, "ms")


def _run(step: Callable, count: int, device: str) -> tuple[list[float], float | None]:
    """Seconds of each step, and the peak of memory with weights and optimizer."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(max(1, count // 3)):
        step()
    wait()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return times, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def _counted(name: str, chosen: argparse.Namespace) -> list[dict]:
    rows = []
    for kind in ("training", "inference"):
        for way in ("fused", "eager"):
            made = []

            def prepare(kind=kind, made=made) -> Callable:
                made.append(_steps(name, chosen, "cpu"))
                step = getattr(made[0], kind)
                step()  # makes the optimizer's state
                return step

            with nullcontext() if way == "fused" else dispatch.reference():
                counted = count(prepare, fused=way == "fused")
            per_image = {
                "MiB moved/image": counted.bytes / 2**20 / chosen.batch,
                "peak MiB/image": counted.peak / 2**20 / chosen.batch,
            }
            rows.append(_row(name, made[0], kind, way) | per_image | {"kernels": counted.kernels})
    return _with_ratios(rows, "MiB moved/image")


def _row(name: str, steps, kind: str, way: str) -> dict:
    return {"model": name, "image": steps.image_size, "batch": steps.batch, "step": kind, "way": way}


def _with_ratios(rows: list[dict], of: str) -> list[dict]:
    """Each row with how many times as much `of` it takes as the fused way."""
    fused = {row["step"]: row[of] for row in rows if row["way"] == "fused"}
    return [row | {"÷ fused": row[of] / fused[row["step"]]} if fused else row for row in rows]


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value
