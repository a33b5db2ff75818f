"""The runs of a sweep as rows of a table, as text and as CSV files: one row per setting, its seeds averaged."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.side_outputs import put

SEED = "seed"
# what a row may show, in this order, and how it is called; of those behind `FIXED` no spread is shown
COLUMNS = {
    "val/top1": "top-1",
    "val/top1_ema": "top-1, EMA",
    "val/loss": "loss",
    "val/recognised_ema": "recognised, EMA",
    "routing/active": "active heads",
    "parameters": "parameters",
    "flops": "multiply-adds",
    "images_per_second": "images/s",
    "peak_memory": "peak memory",
    "epochs": "epochs",
    "seconds": "seconds",
}
FIXED = ("parameters", "flops", "images_per_second", "peak_memory", "epochs", "seconds")


class SweptRun(NamedTuple):
    """One run: what differs in it from the others, its seed and folder, its metrics.json, and why there is none."""

    settings: dict[str, str]
    seed: int
    folder: Path
    figures: dict[str, Any] | None
    said: str = ""

    @property
    def name(self) -> str:
        """As typed, the seed left out: `attention=agent optimizer.lr=0.001`."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items() if key != SEED) or "defaults"

    @property
    def title(self) -> str:
        """The same with the seed, where seeds differ."""
        return f"{self.name} seed={self.seed}" if SEED in self.settings else self.name


class Row(NamedTuple):
    """The runs that differ in their seed only."""

    name: str
    runs: list[SweptRun]

    def values(self, key: str) -> list[float]:
        """The finite figures of its runs."""
        found = [run.figures.get(key) for run in self.runs]
        return [value for value in found if isinstance(value, int | float) and math.isfinite(value)]

    def mean(self, key: str) -> float | None:
        """Over its seeds; None where no run has the figure."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def spread(self, key: str) -> float | None:
        """The standard deviation over its seeds, of a sample (n - 1); None for one seed."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None


def read_run(settings: dict[str, str], seed: int, folder: Path, said: str = "") -> SweptRun:
    """A run with the figures that it left; those of an earlier command are none of a run that failed now."""
    file = folder / "metrics.json"
    figures = _figures(file) if file.exists() and not said else None
    return SweptRun(settings, seed, folder, figures, said or ("" if figures else "it left no metrics.json"))


def _figures(file: Path) -> dict[str, Any] | None:
    """What metrics.json holds; None where it cannot be read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def rows_of(runs: Sequence[SweptRun], monitor: str, mode: str = "max") -> list[Row]:
    """One row per setting, the best mean of `monitor` first; runs without a result are left out."""
    rows: dict[str, Row] = {}
    for run in runs:
        if run.figures is not None:
            rows.setdefault(run.name, Row(run.name, [])).runs.append(run)
    sign = -1 if mode == "max" else 1
    return sorted(rows.values(), key=lambda row: sign * row.mean(monitor) if row.values(monitor) else math.inf)


def columns_of(rows: Sequence[Row], monitor: str) -> dict[str, str]:
    """The figures that there are, with their names; what the runs were chosen by comes first."""
    known = COLUMNS if monitor in COLUMNS else {monitor: label_of(monitor)} | COLUMNS
    return {key: label for key, label in known.items() if any(row.values(key) for row in rows)}


def label_of(key: str) -> str:
    """What a figure is called: the words of its name where the table has none for it."""
    return COLUMNS.get(key) or key.removeprefix("val/").replace("/", " ")


def is_share(key: str) -> bool:
    """Whether a figure is shown in percent: whatever validation measures besides losses, and the share of heads."""
    return (key.startswith("val/") and "loss" not in key) or key == "routing/active"


def cell(row: Row, key: str) -> str:
    """A figure as people read it: `98.61 ± 0.31%`, `0.1306`, `20.3 M`, `412 MiB`."""
    mean, spread = row.mean(key), None if key in FIXED else row.spread(key)
    if mean is None:
        return "-"
    if is_share(key):
        return f"{100 * mean:.2f}{'' if spread is None else f' ± {100 * spread:.2f}'}%"
    if key == "flops":
        return f"{mean / 1e9:.2f} G" if mean >= 1e9 else f"{mean / 1e6:.1f} M"
    if key == "peak_memory":
        return f"{mean / 2**30:.2f} GiB" if mean >= 2**30 else f"{mean / 2**20:.0f} MiB"
    if key in FIXED:
        return f"{mean:,.0f}"
    return f"{mean:.4g}{'' if spread is None else f' ± {spread:.2g}'}"


def table_of(rows: Sequence[Row], columns: dict[str, str]) -> list[list[str]]:
    """Head and rows of the table, as text; a column `seeds` where a row has several."""
    several = any(len(row.runs) > 1 for row in rows)
    head = ["run", *columns.values(), *["seeds"] * several]
    return [head, *([row.name, *(cell(row, k) for k in columns), *[str(len(row.runs))] * several] for row in rows)]


def write_runs(path: Path, runs: Sequence[SweptRun], columns: Sequence[str]) -> Path:
    """runs.csv: one line per run, with what it said where there is no result."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key != SEED))
    lines = [["run", *keys, SEED, *columns, "folder", "failed"]]
    for run in runs:
        settings = [run.settings.get(key) for key in keys]
        figures = [(run.figures or {}).get(key) for key in columns]
        lines.append([run.title, *settings, run.seed, *figures, run.folder, run.said])
    return _write(path, lines)


def write_comparison(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> Path:
    """comparison.csv: one line per row, mean and standard deviation over its seeds, and their number."""
    lines = [["run", "seeds", *(name for key in columns for name in (key, f"{key} sd"))]]
    for row in rows:
        figures = [value for key in columns for value in (row.mean(key), row.spread(key))]
        lines.append([row.name, len(row.runs), *figures])
    return _write(path, lines)


def _write(path: Path, lines: Sequence[Sequence[Any]]) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    put(path, text.getvalue())
    return path
