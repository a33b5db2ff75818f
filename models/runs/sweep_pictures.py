"""Pictures of a sweep: accuracy against active heads where the runs differ in these."""

from collections.abc import Sequence
from pathlib import Path

from models.runs.sweep import Row

ACTIVE = "routing/active"


def draw_active_heads(path: Path, rows: Sequence[Row]) -> Path | None:
    """Top-1 against the share of active heads, raw and averaged weights; None unless two rows differ in that share."""
    nan = float("nan")
    points = sorted(
        (100 * row.mean(ACTIVE), 100 * row.mean("val/top1"), 100 * (row.mean("val/top1_ema") or nan))
        for row in rows
        if row.values(ACTIVE) and row.values("val/top1")
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
