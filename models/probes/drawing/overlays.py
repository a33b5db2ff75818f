"""Maps over pictures: heat of any coarseness, a marked point, and panels of them side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from models.probes.drawing.charts import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 224  # pixels of the shorter side of what is drawn
MOST = 12  # panels abreast
STRENGTH = 0.75  # of the hottest colour
PANEL = 1.7  # inches
ROOT, ARROW = "#e08a3c", "#3fa7ff"


def overlay(picture: Image.Image, weights_HW: Tensor, *, point: tuple[float, float] | None = None) -> Image.Image:
    """Heat over a grey picture of at least 224 pixels: the largest weight is the hottest, at zero the picture stays.

    Args:
        picture: in RGB.
        weights_HW: of the cells of a map that covers it, whatever their number; those below zero count as zero.
        point: marked with a cross, as fractions from the left and from the top.
    """
    from matplotlib import colormaps

    base = enlarged(picture)
    weights = weights_HW.detach().float().clamp_min(0).cpu().numpy()
    heat = weights / max(float(weights.max()), 1e-12)
    cells = Image.fromarray((heat * 255).astype(np.uint8)).resize(base.size, Image.Resampling.NEAREST)
    share = np.asarray(cells, np.float32)[..., None] / 255
    colours = colormaps["inferno"](share[..., 0])[..., :3]
    grey = np.asarray(base.convert("L").convert("RGB"), np.float32) / 255
    mixed = grey * (1 - STRENGTH * share) + colours * STRENGTH * share
    drawn = Image.fromarray((mixed.clip(0, 1) * 255).round().astype(np.uint8))
    if point is not None:
        _cross(drawn, point)
    return drawn


def arrows(picture: Image.Image, to_N: list[int], grid: tuple[int, int]) -> Image.Image:
    """From every cell of a map over a grey picture to the cell that it names; a ring where that is itself."""
    base = enlarged(picture).convert("L").convert("RGB")
    draw, (rows, columns) = ImageDraw.Draw(base), grid
    high, wide = base.height / rows, base.width / columns
    for start, end in enumerate(to_N):
        (y, x), (down, across) = (
            ((cell // columns + 0.5) * high, (cell % columns + 0.5) * wide) for cell in (start, end)
        )
        if start == end:
            size = min(high, wide) / 3
            draw.ellipse([x - size, y - size, x + size, y + size], outline=ROOT, width=2)
            continue
        draw.line([(x, y), (across, down)], fill=ARROW, width=1)
        length = float(np.hypot(across - x, down - y))
        along, size = np.array([across - x, down - y]) / length, min(high, wide) / 3
        aside, tip = np.array([-along[1], along[0]]), np.array([across, down])
        corners = (tip, tip - size * along + size / 2 * aside, tip - size * along - size / 2 * aside)
        draw.polygon([tuple(corner) for corner in corners], fill=ARROW)
    return base


def enlarged(picture: Image.Image) -> Image.Image:
    """At least `LEAST` pixels at its shorter side, by whole factors, so that pixels stay squares."""
    factor = -(-LEAST // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def sheet(rows: list[list[tuple[Image.Image, str]]], title: str = "") -> Figure:
    """Panels with a word above each, at most `MOST` abreast."""
    lines = [row[i : i + MOST] for row in rows for i in range(0, len(row), MOST)]
    columns = max(map(len, lines), default=1)
    figure = canvas(PANEL * columns + 0.2, (PANEL + 0.25) * len(lines) + 0.4)
    for axis in (axes := figure.subplots(len(lines), columns, squeeze=False)).flat:
        axis.set_axis_off()
    for line, part in enumerate(lines):
        for axis, (picture, word) in zip(axes[line], part, strict=False):
            axis.imshow(picture)
            axis.set_title(word, fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def _cross(picture: Image.Image, point: tuple[float, float]) -> None:
    x, y = point[0] * picture.width, point[1] * picture.height
    arm, draw = max(5, picture.width // 30), ImageDraw.Draw(picture)
    for width, colour in ((5, "black"), (2, "white")):
        draw.line([(x - arm, y), (x + arm, y)], fill=colour, width=width)
        draw.line([(x, y - arm), (x, y + arm)], fill=colour, width=width)
