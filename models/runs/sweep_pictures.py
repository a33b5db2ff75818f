"""Pictures of a sweep: the curves of all runs on one axis, accuracy against what it costs, and against active heads."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.loggers.metrics_csv import read_metrics
from models.runs.sweep import Row, SweptRun, is_share, label_of
from models.side_outputs import put_figure

ACTIVE = "routing/active"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")
NAMED = 12  # rows that a picture has room to name

Curve = dict[float, float]  # figure by epoch


def draw_comparison(path: Path, rows: Sequence[Row], monitor: str) -> Path | None:
    """Curves over epochs, mean and range over seeds; None where no run has any."""
    keys = [key for key in dict.fromkeys((monitor, "val/loss", "train/loss")) if any(_curves(row, key) for row in rows)]
    if not keys:
        return None
    figure, axes = _canvas(len(keys))
    for axis, key in zip(axes, keys, strict=True):
        for number, row in enumerate(rows):
            _draw_row(axis, _curves(row, key), scale_of(key), _style(number) | {"label": row.name})
        axis.set(title=_title(key), xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if len(rows) <= NAMED:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    put_figure(path, figure, 110)
    return path


class Cost(NamedTuple):
    """One way to count what a run costs: the figure, its axis, the factor of its unit."""

    key: str
    label: str
    scale: float


COSTS = (
    Cost("flops", "multiply-adds (M), fewer is better", 1e-6),
    Cost("parameters", "parameters (M), fewer is better", 1e-6),
    Cost("images_per_second", "images/s in training, more is better", 1.0),
    Cost("peak_memory", "peak memory (MiB), less is better", 2.0**-20),
)


def draw_pareto(path: Path, rows: Sequence[Row], monitor: str, mode: str) -> Path | None:
    """What the runs reach against each cost in which they differ; None where they differ in none."""
    rows = [row for row in rows if row.values(monitor)]
    costs = [cost for cost in COSTS if len({row.mean(cost.key) for row in rows} - {None}) > 1]
    if not costs:
        return None
    figure, axes = _canvas(len(costs))
    for axis, cost in zip(axes, costs, strict=True):
        for number, row in enumerate(rows):
            if row.values(cost.key):
                _draw_point(axis, row, monitor, cost, _style(number)["color"])
        front = pareto([(row.mean(cost.key), row.mean(monitor)) for row in rows], _more_is_better(cost), mode == "max")
        points = [(cost.scale * x, scale_of(monitor) * y) for x, y in front]
        axis.plot(*zip(*points, strict=True), color="0.6", linewidth=1, linestyle="--", zorder=1)
        axis.set(xlabel=cost.label)
        axis.grid(alpha=0.3)
        axis.margins(0.15)
    axes[0].set_ylabel(_title(monitor))
    if len(rows) <= NAMED:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    put_figure(path, figure, 110)
    return path


def pareto(
    points: Sequence[tuple[float | None, float]], more_is_better: bool, best_is_high: bool
) -> list[tuple[float, float]]:
    """Those that no other beats in cost and result at once, from the cheapest on."""
    found: list[tuple[float, float]] = []
    cost_sign, result_sign = (-1 if more_is_better else 1), (1 if best_is_high else -1)
    known = [(cost, result) for cost, result in points if cost is not None]
    for cost, result in sorted(known, key=lambda point: (cost_sign * point[0], -result_sign * point[1])):
        if not found or result_sign * result > result_sign * found[-1][1]:
            found.append((cost, result))
    return found


def draw_active_heads(path: Path, rows: Sequence[Row]) -> Path | None:
    """Top-1 against the share of active heads, raw and averaged weights; None unless two rows differ in that share."""
    points = sorted(
        (100 * row.mean(ACTIVE), 100 * row.mean("val/top1"), 100 * (row.mean("val/top1_ema") or math.nan))
        for row in rows
        if row.values(ACTIVE) and row.values("val/top1")
    )
    if len({active for active, *_ in points}) < 2:
        return None
    figure, (axis,) = _canvas(1)
    active, raw, averaged = zip(*points, strict=True)
    axis.plot(active, raw, marker="o", label="top-1")
    axis.plot(active, averaged, marker="s", label="top-1, EMA", linestyle="--")
    axis.set(xlabel="active heads (%)", ylabel="top-1 (%)", title="accuracy against active heads")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    put_figure(path, figure, 120)
    return path


def scale_of(key: str) -> float:
    """Shares are drawn in percent."""
    return 100.0 if is_share(key) else 1.0


def curve(run: SweptRun, key: str) -> Curve:
    """A figure by epochs done; of several within one epoch the mean."""
    by_epoch: dict[float, list[float]] = {}
    for line in read_metrics(run.folder / "metrics.csv"):
        if key in line and math.isfinite(float(line[key])):
            by_epoch.setdefault(float(line["epoch"]) + 1, []).append(float(line[key]))
    return {epoch: sum(values) / len(values) for epoch, values in sorted(by_epoch.items())}


def _curves(row: Row, key: str) -> list[Curve]:
    return [found for run in row.runs if (found := curve(run, key))]


def _draw_row(axis: Any, curves: Sequence[Curve], scale: float, style: Mapping[str, Any]) -> None:
    """A line through the means, and a band from the lowest to the highest seed."""
    epochs = sorted({epoch for each in curves for epoch in each})
    if not epochs:
        return
    values = [[scale * each[epoch] for each in curves if epoch in each] for epoch in epochs]
    axis.plot(epochs, [sum(v) / len(v) for v in values], **style, marker="." if len(epochs) < 40 else None)
    if len(curves) > 1:
        axis.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.15)


def _draw_point(axis: Any, row: Row, monitor: str, cost: Cost, colour: str) -> None:
    scale, spread = scale_of(monitor), row.spread(monitor)
    height = None if spread is None else scale * spread
    x, y = cost.scale * row.mean(cost.key), scale * row.mean(monitor)
    axis.errorbar(x, y, yerr=height, fmt="o", color=colour, capsize=3, label=row.name)


def _more_is_better(cost: Cost) -> bool:
    return cost.key == "images_per_second"


def _title(key: str) -> str:
    return label_of(key) + (" (%)" if scale_of(key) == 100 else "")


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}


def _canvas(panels: int) -> tuple[Any, Sequence[Any]]:
    """A figure of so many panels in a row, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * panels, 3.4 if panels == 1 else 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]
