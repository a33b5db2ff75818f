"""Pictures of data: how many images each class has, how large images are, and what the model is shown of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 60  # classes up to which bars are named
BLUE, ORANGE = "#3b6fb6", "#e08a3c"
COLUMNS = 8  # of a sheet of images


def chart_of_classes(classes: list[str], counts: dict[str, np.ndarray]) -> Figure:
    """A bar per class and split, the largest class first."""
    order = np.argsort(-sum(counts.values()), kind="stable")
    figure = canvas(8.0, 1.2 + min(12.0, max(1.5, 0.22 * len(classes))))
    axis = figure.subplots()
    left = np.zeros(len(classes))
    for (name, count), colour in zip(counts.items(), (BLUE, ORANGE), strict=False):
        axis.barh(range(len(classes)), count[order], left=left, color=colour, label=name)
        left = left + count[order]
    axis.set(title="images per class", xlabel="images", ylim=(len(classes) - 0.4, -0.6))
    named = range(len(classes)) if len(classes) <= NAMED else []
    axis.set_yticks(named, [classes[order[i]] for i in named])
    axis.legend(loc="lower right")
    return figure


def chart_of_sizes(sizes: list[tuple[int, int]]) -> Figure:
    """Widths and heights, a dot for each size, the larger the more images have it."""
    figure = canvas(5.0, 4.5)
    axis = figure.subplots()
    found, number = np.unique(np.array(sizes).reshape(-1, 2), axis=0, return_counts=True)
    if len(found):
        axis.scatter(found[:, 0], found[:, 1], s=12 + 120 * number / number.max(), color=BLUE, alpha=0.5, linewidths=0)
        side = 1.05 * found.max()
        axis.plot([0, side], [0, side], color="0.7", linewidth=1, zorder=0)
        axis.set(xlim=(0, side), ylim=(0, side))
    axis.set(title="sizes of the images", xlabel="width, pixels", ylabel="height, pixels", aspect="equal")
    return figure


def sheet(rows: list[tuple[str, list[tuple[Any, str]]]]) -> Figure:
    """Images (H, W) or (H, W, 3) from 0 to 1 with what is written below them, under the title of their group."""
    lines = [(title, part[i : i + COLUMNS]) for title, part in rows for i in range(0, len(part), COLUMNS)]
    figure = canvas(1.5 * COLUMNS, 1.95 * len(lines) + 0.2)
    axes = figure.subplots(len(lines), COLUMNS, squeeze=False)
    titled: set[str] = set()
    for line, (title, part) in enumerate(lines):
        for column, axis in enumerate(axes[line]):
            axis.set_axis_off()
            if column < len(part):
                image, below = part[column]
                axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.text(0.5, -0.04, below, transform=axis.transAxes, ha="center", va="top", fontsize=8)
        if title not in titled:
            axes[line][0].set_title(title, loc="left", fontsize=10, fontweight="bold")
            titled.add(title)
    return figure


def canvas(width: float, height: float) -> Figure:
    """An empty figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
