"""Mechanisms side by side as maps grow: time and memory, forward and training, and where they cross.

One mixer of each on a square map, with random weights and tokens, in the precision of the trainer. Where the settings
of a mechanism are one per stage they are those of the third, whose place a plain ViT has too.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from conf import values
from kernels.bench.calls import call_of
from kernels.bench.counting import count
from kernels.bench.environment import environment
from kernels.bench.timing import CudaTimer, Spread
from models.attention import Grid, Mixer
from models.probes import Report
from models.probes.drawing.crossings import crossings, verdict
from models.probes.drawing.scaling_chart import scaling_chart
from models.probes.reading.contenders import WHO, Contender, contenders

LEAST = 3  # calls that count at least
SHARE = 0.8  # of the free memory that a call may take


def benchmark(
    trainer: pl.Trainer,
    attentions: Any = ("softmax", "window", "agent", "focused_linear", "biformer"),
    sizes: int | Sequence[int] = (8, 16, 32, 64),
    batch: int | Sequence[int] = 1,
    dim: int = 192,
    heads: int = 6,
    training: bool = True,
    seconds: float = 0.5,
    longest: float = 20.0,
) -> Report:
    """A row for every mechanism, batch and size; what cannot be measured is a row with its reason.

    Memory is the most that is held besides weights and tokens: measured on a GPU; on a CPU counted from the graph of
    the same call, of which the room that an operation takes within itself is no part.

    Args:
        trainer: see `models.probes`.
        attentions: all, or names with settings, see `models.probes.reading.contenders`; the first is compared with.
        sizes: tokens per side of the map.
        batch: images at once.
        dim, heads: of the tokens.
        training: measure forward and backward together, too.
        seconds: to repeat each measurement for.
        longest: seconds of one call after which larger maps of a mechanism are left out.
    """
    sides, batches = sorted(_wholes("sizes", sizes, "[16,32]")), _wholes("batch", batch, "1")
    values.whole(WHO, "dim", dim, fix="set probe.dim=192")
    values.whole(WHO, "heads", heads, fix="set probe.heads=6")
    values.flag(WHO, "training", training, fix="set probe.training=true")
    for name, value in (("seconds", seconds), ("longest", longest)):
        values.number(WHO, name, value, fix=f"set probe.{name}={'0.5' if name == 'seconds' else '20'}")
    if dim % heads:
        values.refuse(WHO, "heads", f"a divisor of the {dim} channels", heads, "set probe.heads or probe.dim")
    chosen, parts = contenders(attentions), ("forward", "training") if training else ("forward",)
    bench = Bench(trainer, dim, heads, parts, seconds, longest)
    rows = []
    for number, contender in enumerate(chosen, start=1):
        print(f"{WHO}: {contender.name}, {number} of {len(chosen)}", flush=True)
        rows += [row for size in batches for row in bench.rows(contender, size, sides)]
    return _report(rows, bench, batches, chosen)


class Bench:
    """Measures mixers on the device of a trainer, in its precision."""

    def __init__(
        self, trainer: pl.Trainer, dim: int, heads: int, parts: Sequence[str], seconds: float, longest: float
    ) -> None:
        self.device, self.context = trainer.strategy.root_device, trainer.precision_plugin.forward_context
        self.precision, self.dim, self.heads, self.parts = str(trainer.precision), dim, heads, tuple(parts)
        self.seconds, self.longest, self.cuda = seconds, longest, self.device.type == "cuda"
        self.timer = CudaTimer(max(1, int(1000 * seconds))) if self.cuda else HostTimer(seconds)

    def rows(self, contender: Contender, batch: int, sides: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Of one mechanism, the smallest map first; without larger ones once a call takes too long."""
        slowest, at = 0.0, 0
        for side in sides:
            row = {"attention": contender.name, "side": side, "tokens": side * side, "batch": batch}
            if slowest > self.longest * 1e3:
                yield row | {"note": f"a call took {slowest / 1e3:.0f} s at {at}x{at}, longer than probe.longest"}
                continue
            found = self._row(contender, batch, side)
            slowest, at = max([slowest, *(found.get(f"{part}_ms", 0.0) for part in self.parts)]), side
            yield row | found

    def _row(self, contender: Contender, batch: int, side: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        try:
            with torch.device(self.device):
                mixer = contender.mixer(self.dim, self.heads, side)
            runs = mixer.runs()
            row["computed_by"] = runs.operation if runs.fused and self.cuda else "PyTorch"
            for part in self.parts:
                row |= self._part(part, contender, mixer, batch, side)
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        except MemoryError as error:
            row["note"] = str(error)
        except Exception as error:  # what a mechanism or a compiler does not take is what is found out here
            row["note"] = f"{_kind(error)}{str(error).partition(chr(10))[0]}"
        if self.cuda:
            torch.cuda.empty_cache()
        return row

    def _part(self, part: str, contender: Contender, mixer: Mixer, batch: int, side: int) -> dict[str, Any]:
        """Milliseconds, with their spread, and bytes, of `forward` or `training`.

        Raises:
            MemoryError: so much is not free.
        """
        held = None
        if not self.cuda:
            made = partial(contender.mixer, self.dim, self.heads, side)
            counted = count(lambda: self.call(part, made(), batch, side))
            held = None if counted is None else counted.peak
            if held is not None and held > SHARE * free_memory():
                raise MemoryError(f"{part} would hold {held / 2**30:.1f} GiB, {free_memory() / 2**30:.1f} are free")
        call = self.call(part, mixer, batch, side)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()  # compiles, and allocates what stays
            spread = self.timer.time(call)
            held = self.timer.peak(call) if self.cuda else held
        return {f"{part}_ms": spread.median, f"{part}_low": spread.low, f"{part}_high": spread.high} | {
            f"{part}_bytes": held
        }

    def call(self, part: str, mixer: Mixer, batch: int, side: int) -> Callable[[], Any]:
        """`forward` without gradients, or `training` with those of tokens and parameters, on random tokens."""
        mixer.train(part == "training")
        grid = Grid(side, side)
        x_BNC = torch.randn(batch, grid.tokens, self.dim, device=self.device, requires_grad=part == "training")

        def function(x_BNC: Tensor, **parameters: Tensor) -> tuple[Tensor, ...]:
            stream = {"stream_BNC": x_BNC} if mixer.reads_stream else {}
            with self.context():
                mixed = mixer(x_BNC, grid, **stream)
            return (mixed.x, *mixed.losses.values())

        return call_of(part, function, {"x_BNC": x_BNC} | dict(mixer.named_parameters()))


class HostTimer:
    """Milliseconds on a CPU: calls are repeated for some seconds, and at least a few times."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def time(self, function: Callable[[], Any]) -> Spread:
        """The median, and what a fifth of the calls stayed below and above."""
        passes, end = [], time.perf_counter() + self.seconds
        while len(passes) < LEAST or time.perf_counter() < end:
            start = time.perf_counter()
            function()
            passes.append(1e3 * (time.perf_counter() - start))
        low, high = np.percentile(passes, [20, 80])
        return Spread(statistics.median(passes), float(low), float(high))


def free_memory() -> float:
    """Bytes that a process may still take on this machine; infinite where nobody says."""
    try:
        with open("/proc/meminfo") as file:
            return 1024 * float(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration):
        return float("inf") if not hasattr(os, "sysconf") else _free_pages()


def _free_pages() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return float("inf")


def _report(rows: list[dict[str, Any]], bench: Bench, batches: list[int], chosen: list[Contender]) -> Report:
    names = [contender.name for contender in chosen]
    where = environment() | {"precision": bench.precision, "threads": torch.get_num_threads()}
    figures: dict[str, Any] = dict(where)
    table, pictures, lines = [], {}, []
    said = f"time and memory as maps grow; circles: where {names[0]} and another take the same time"
    for batch in batches:
        of_batch = [row for row in rows if row["batch"] == batch]
        named = "" if len(batches) == 1 else f"batch {batch}: "
        curves = {part: _curves(of_batch, names, part) for part in bench.parts}
        met = {part: crossings(curves[part]) for part in bench.parts}
        table += [{"batch": batch, "part": part} | c._asdict() for part in bench.parts for c in met[part]]
        with_first = {part: [c for c in met[part] if names[0] in c[:2]] for part in bench.parts}
        picture = "benchmark" if len(batches) == 1 else f"batch-{batch}"
        title = f"one mixer, {bench.dim} channels, {bench.heads} heads, batch {batch}, {where['device']}"
        pictures[picture] = scaling_chart(title, of_batch, with_first, bench.parts)
        for name in names[1:]:
            told = ", ".join(f"{part} {verdict(name, names[0], curves[part])}" for part in bench.parts)
            lines.append(f"{named}{name} against {names[0]}: {told}")
    for row in rows:
        place = f"{row['attention']}/{row['batch']}x{row['side']}x{row['side']}"
        figures |= {f"{place}/{key}": row[key] for key in row if key.endswith(("_ms", "_bytes"))}
    if hasattr(os, "getloadavg") and not bench.cuda and os.getloadavg()[0] > (os.cpu_count() or 1):
        lines.append("others compute on this machine too: times and crossings are not its own")
    memory = "measured" if bench.cuda else "counted from the graph of a call"
    lines.append(
        f"{where['device']}, {where['threads']} threads, precision {bench.precision}; "
        f"peak memory besides weights and tokens is {memory}"
    )
    tables = {"benchmark": rows} | ({"crossings": table} if table else {})
    captions = dict.fromkeys(pictures, said)
    return Report(figures, _shown(rows, bench.parts, len(batches) > 1), tables, pictures, captions, lines=lines)


def _curves(rows: list[dict[str, Any]], names: list[str], part: str) -> dict[str, dict[int, Spread]]:
    measured = [row for row in rows if f"{part}_ms" in row]
    keys = [f"{part}_{key}" for key in ("ms", "low", "high")]
    return {
        n: {row["side"]: Spread(*(row[k] for k in keys)) for row in measured if row["attention"] == n} for n in names
    }


def _shown(rows: list[dict[str, Any]], parts: Sequence[str], several: bool) -> dict[str, str]:
    shown = {}
    for row in rows:
        measured = [
            f"{part} {row[f'{part}_ms']:.2f} ms"
            + (f", {row[f'{part}_bytes'] / 2**20:,.1f} MiB" if row[f"{part}_bytes"] is not None else "")
            for part in parts
            if f"{part}_ms" in row
        ]
        name = f"{row['attention']} {row['side']}x{row['side']}" + (f", batch {row['batch']}" if several else "")
        shown[name] = "; ".join(measured + ([row["note"]] if "note" in row else []))
    return shown


def _kind(error: Exception) -> str:
    """What kind of error it is, where it is none of ours, which are sentences."""
    return "" if isinstance(error, ValueError) else f"{type(error).__name__}: "


def _wholes(name: str, given: Any, example: str) -> list[int]:
    found = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not found:
        values.refuse(WHO, name, "at least one number", given, f"set probe.{name}={example}")
    return [values.whole(WHO, name, value, fix=f"set probe.{name}={example}") for value in dict.fromkeys(found)]
