"""A picture of how time and memory of mechanisms grow with the map: log-log, a line each, crossings marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.probes.drawing.charts import canvas
from models.probes.drawing.crossings import Crossing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DISTINCT = 10  # lines of one style


def scaling_chart(
    title: str, rows: Sequence[Mapping[str, Any]], met: Mapping[str, Sequence[Crossing]], parts: Sequence[str]
) -> Figure:
    """Time above, memory below, a column for each part (`forward`, `training`).

    Args:
        title: of the picture.
        rows: with `attention`, `side`, and `<part>_ms` and `<part>_bytes` where they were measured.
        met: the crossings that are marked, by part.
        parts: that were measured.
    """
    figure = canvas(0.8 + 4.4 * len(parts), 7.2)
    axes = figure.subplots(2, len(parts), squeeze=False, sharex=True)
    sides, names = sorted({row["side"] for row in rows}), list(dict.fromkeys(row["attention"] for row in rows))
    for column, part in enumerate(parts):
        for axis, key, scale, unit in zip(axes[:, column], ("ms", "bytes"), (1, 2**20), ("ms", "MiB"), strict=True):
            for number, name in enumerate(names):
                _line(axis, [row for row in rows if row["attention"] == name], f"{part}_{key}", scale, number)
            axis.set(xscale="log", yscale="log", title=f"{part}, {unit}")
            axis.set_xticks(sides, [f"{side}x{side}" for side in sides])
            axis.minorticks_off()
            axis.grid(color="0.9")
        for crossing in met.get(part, ()):
            axes[0, column].plot(crossing.side, crossing.milliseconds, "o", ms=11, mfc="none", mec="0.2")
        axes[1, column].set_xlabel("map, tokens")
    figure.suptitle(title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(names)))
    return figure


def _line(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, scale: float, number: int) -> None:
    points = [(row["side"], row[key] / scale) for row in rows if row.get(key)]
    style = ("-", "--", ":", "-.")[number // DISTINCT % 4]
    axis.plot(*zip(*points, strict=True) if points else ([], []), style, marker=".", label=rows[0]["attention"])
