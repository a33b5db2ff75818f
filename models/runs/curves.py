"""curves.png of a run: losses, accuracies and the learning rate over steps and epochs, drawn from metrics.csv."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.loggers.metrics_csv import read_metrics
from models.side_outputs import put_figure


class Line(NamedTuple):
    """One kind of figure: the same colour and name in every panel."""

    name: str
    colour: str


TRAIN, RAW, EMA = Line("train", "#7f7f7f"), Line("validation", "#0072b2"), Line("validation, EMA", "#e69f00")
RATE = Line("", "#444444")
PANELS = {
    "loss": {"train/loss": TRAIN, "val/loss": RAW, "val/loss_ema": EMA},
    "top-1 (%)": {"val/top1": RAW, "val/top1_ema": EMA},
    "recognised (%)": {"val/recognised": RAW, "val/recognised_ema": EMA},
    "learning rate": {"lr": RATE},
}
Points = tuple[list[int], list[float]]


def draw_curves(
    run_dir: Path, title: str = "", monitor: str | None = None, mode: str = "max", per_epoch: float | None = None
) -> Path | None:
    """Draws `curves.png` in the folder of a run.

    Args:
        run_dir: holds metrics.csv.
        title: what ran.
        monitor: the figure whose best value gets a star.
        mode: "max" or "min", what the best is.
        per_epoch: optimizer steps of an epoch, for the axis of epochs above; None for none.

    Returns:
        The path; None without figures.
    """
    rows = read_metrics(run_dir / "metrics.csv")
    panels = {
        label: found
        for label, lines in PANELS.items()
        if (found := {key: points for key in lines if (points := _points(rows, key))[0]})
    }
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    for axis, (label, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key, points in found.items():
            scale = 100 if "%" in label else 1
            _draw(axis, PANELS[label][key], (points[0], [scale * value for value in points[1]]))
            if key == monitor:
                _star(axis, PANELS[label][key].colour, points, scale, mode)
        _label(axis, label, per_epoch)
    path = run_dir / "curves.png"
    put_figure(path, figure)
    return path


def _draw(axis: Any, line: Line, points: Points) -> None:
    marker = "." if len(points[0]) < 40 else None
    axis.plot(*points, label=line.name, color=line.colour, linewidth=1.5, marker=marker)


def _star(axis: Any, colour: str, points: Points, scale: float, mode: str) -> None:
    """Marks the best value; of equal ones the first, as the checkpoint is chosen."""
    best = (max if mode == "max" else min)(points[1])
    shown = f"best: {scale * best:.2f}" if scale == 100 else f"best: {best:.4g}"
    step = points[0][points[1].index(best)]
    axis.plot([step], [scale * best], marker="*", markersize=12, color=colour, linestyle="none", label=shown)


def _label(axis: Any, label: str, per_epoch: float | None) -> None:
    axis.set(ylabel=label, xlabel="step")
    axis.grid(alpha=0.3)
    if any(line.get_label() and not line.get_label().startswith("_") for line in axis.lines):
        axis.legend(frameon=False, fontsize="small")
    if label == "learning rate":
        axis.yaxis.set_major_formatter(lambda value, position: short_number(value))
    if per_epoch:
        above = axis.secondary_xaxis("top", functions=(lambda step: step / per_epoch, lambda epoch: epoch * per_epoch))
        above.set_xlabel("epoch")
        above.xaxis.get_major_locator().set_params(integer=True)


def short_number(value: float) -> str:
    """ "2e-4", "2.5e-4", "0"."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}" if value else "0"


def _points(rows: Sequence[dict[str, str]], key: str) -> Points:
    found = [(int(float(row["step"])), float(row[key])) for row in rows if row.get(key)]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]
