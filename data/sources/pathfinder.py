"""Curves on black, two of whose ends are marked: is it one curve that joins them? Drawn when an image is asked for.

Source: the task is that of Linsley et al., Learning long-range spatial dependencies with horizontal gated recurrent
units, arXiv:1805.08315, and of Long Range Arena, arXiv:2011.04006; the drawing is ours. The answer cannot be read from
the marks: ends of two curves are chosen as far apart as the two ends of one are, curves never touch, and both answers
have as many curves and free ends. Only following a curve from one mark to its other end tells.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from conf.values import choice
from data.order.randomness import NOISE, generator

WIDTH, MARK = 0.022, 0.045  # shares of the shorter side: thickness of a line, radius of a mark
JITTER = 0.18  # of the distance between neighbours of the grid
SMOOTH = 4  # points of a line for each node

Node = tuple[int, int]  # column and row


class Level(NamedTuple):
    """How hard it is: curves, the nodes that each goes through, nodes of the grid along a side, and dashes."""

    curves: int
    nodes: int
    grid: int
    dashed: bool


LEVELS = {
    "easy": Level(2, 3, 4, False),
    "medium": Level(3, 5, 6, False),
    "hard": Level(5, 9, 9, True),
}


class PathfinderSplit:
    """Image `i` depends on (seed, split, i) only; its label is 1 where one curve joins the marks, of every other."""

    def __init__(self, length: int, size: tuple[int, int], level: Level, seed: int, split: int) -> None:
        self.size, self.level, self.seed, self.split = size, level, seed, split
        self.labels = np.arange(length, dtype=np.int64) % 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        named = generator(self.seed, NOISE, self.split, index)
        chance, label = Random(int(named.integers(2**62))), int(self.labels[index])
        paths, ends = marked(chance, self.level, label == 1)
        jitter_CP2 = named.uniform(-JITTER, JITTER, (self.level.curves, self.level.nodes, 2))
        curves_CP2 = (np.array(paths) + 0.5 + jitter_CP2) / self.level.grid
        return draw(curves_CP2, [curves_CP2[end] for end in ends], self.size, self.level.dashed), label


class Pathfinder:
    """Two classes, as many images as asked for.

    Args:
        difficulty: easy, medium or hard; see `LEVELS`.
        size: height and width in pixels, or one number for both.
        train_images, val_images: images per split.
        seed: names the images.
    """

    embedded = False  # drawn in the workers

    def __init__(
        self,
        difficulty: str = "easy",
        size: int | Sequence[int] = 32,
        train_images: int = 20_000,
        val_images: int = 2_000,
        seed: int = 0,
    ) -> None:
        choice("data: pathfinder", "difficulty", difficulty, LEVELS, fix="set data.source.difficulty=easy")
        self.level = LEVELS[difficulty]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.train_images, self.val_images, self.seed = train_images, val_images, seed
        self.classes = ["apart", "joined"]

    @cached_property
    def train(self) -> PathfinderSplit:
        return PathfinderSplit(self.train_images, self.size, self.level, self.seed, 0)

    @cached_property
    def val(self) -> PathfinderSplit:
        return PathfinderSplit(self.val_images, self.size, self.level, self.seed, 1)


def grown(chance: Random, level: Level) -> list[list[Node]]:
    """Paths along a grid that share no node: each turns where it likes, and begins anew where it is caught."""
    while True:
        free, paths = {(x, y) for x in range(level.grid) for y in range(level.grid)}, []
        for _ in range(10 * level.curves):
            path = _path(chance, free, level.nodes)
            if len(path) == level.nodes:
                paths.append(path)
                free -= set(path)
            if len(paths) == level.curves:
                return paths


def _path(chance: Random, free: set[Node], nodes: int) -> list[Node]:
    """From node to neighbour through what is free; shorter where there is no way on."""
    here = sorted(free)[int(chance.random() * len(free))]
    path = [here]
    while len(path) < nodes:
        x, y = here
        ways = [way for way in ((x + 1, y), (x, y + 1), (x - 1, y), (x, y - 1)) if way in free and way not in path]
        if not ways:
            break
        here = ways[int(chance.random() * len(ways))]
        path.append(here)
    return path


def marked(chance: Random, level: Level, joined: bool) -> tuple[list[list[Node]], list[tuple[int, int]]]:
    """Paths, and two of their ends, each the number of its path and 0 or -1.

    Both of one path; or of two paths, exactly as far apart as the ends of one that was drawn for it: new paths are
    drawn until there are such ends.
    """
    paths = grown(chance, level)
    chosen = int(chance.random() * len(paths))
    if joined:
        return paths, [(chosen, 0), (chosen, -1)]
    wanted = _squared(paths[chosen][0], paths[chosen][-1])
    ends = [(number, side) for number in range(len(paths)) for side in (0, -1)]
    while True:
        paths = grown(chance, level)
        pairs = [[one, other] for one, other in combinations(ends, 2) if one[0] != other[0]]
        fitting = [pair for pair in pairs if _squared(*(paths[number][side] for number, side in pair)) == wanted]
        if fitting:
            return paths, fitting[int(chance.random() * len(fitting))]


def _squared(one: Node, other: Node) -> int:
    return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2


def draw(curves_CP2: np.ndarray, marks: Sequence[np.ndarray], size: tuple[int, int], dashed: bool) -> Image.Image:
    """White on black, drawn larger and reduced, so that lines are smooth at any size."""
    finer = max(2, round(128 / min(size)))
    scale = np.array(size[::-1]) * finer
    image = Image.new("L", tuple(scale.tolist()))
    pen, thickness = ImageDraw.Draw(image), max(finer, round(WIDTH * min(scale)))
    for line_T2 in rounded(curves_CP2) * scale:
        pieces = [line_T2[i : i + 4] for i in range(0, len(line_T2) - 1, 5)] if dashed else [line_T2]
        for piece in pieces:
            pen.line(piece.ravel().tolist(), fill=200, width=thickness, joint="curve")
    radius = MARK * min(scale)
    for x, y in (mark * scale for mark in marks):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return image.reduce(finer).convert("RGB")


def rounded(curves_CP2: np.ndarray) -> np.ndarray:
    """Corners rounded off (C, T, 2): quadratic B-splines, which begin and end where the curves do."""
    middle = (curves_CP2[:, 1:] + curves_CP2[:, :-1]) / 2
    t = np.linspace(0, 1, SMOOTH, endpoint=False)[:, None]
    start, corner, stop = (part[:, :, None] for part in (middle[:, :-1], curves_CP2[:, 1:-1], middle[:, 1:]))
    bends = (1 - t) ** 2 * start + 2 * t * (1 - t) * corner + t**2 * stop
    bends = bends.reshape(len(curves_CP2), -1, 2)
    return np.concatenate([curves_CP2[:, :1], bends, middle[:, -1:], curves_CP2[:, -1:]], axis=1)
