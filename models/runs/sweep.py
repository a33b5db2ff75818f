"""What a sweep leaves besides its runs: a table of them, and accuracy against active heads where these differ."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ACTIVE = "routing/active"


def write_table(path: Path, runs: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str]) -> Path:
    """A CSV file with one row per run: its name and the figures of its metrics.json."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *columns])
        writer.writerows([name, *(figures.get(key) for key in columns)] for name, figures in runs)
    return path


def draw_active_heads(path: Path, runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Path | None:
    """Top-1 against the share of active heads, raw and averaged weights; None unless two runs differ in that share."""
    points = sorted(
        (100 * figures[ACTIVE], 100 * figures["val/top1"], 100 * figures.get("val/top1_ema", float("nan")))
        for _, figures in runs
        if figures.get(ACTIVE) is not None and figures.get("val/top1") is not None
    )
    if len({active for active, *_ in points}) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    active, raw, averaged = zip(*points, strict=True)
    axis.plot(active, raw, marker="o", label="top-1")
    axis.plot(active, averaged, marker="s", label="top-1, EMA", linestyle="--")
    axis.set(xlabel="active heads (%)", ylabel="top-1 (%)", title="accuracy against active heads")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path
