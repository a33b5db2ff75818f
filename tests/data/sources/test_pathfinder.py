"""Pathfinder: every image depends on its name alone, and only following a curve tells the answer."""

from itertools import combinations, pairwise
from random import Random

import numpy as np
import pytest

from data.sources.pathfinder import LEVELS, Pathfinder, grown, marked


def test_images_depend_on_seed_split_and_index_only():
    one, other = Pathfinder(size=24), Pathfinder(size=24)
    image, label = one.train[7]
    assert image.mode == "RGB" and image.size == (24, 24) and label == 1
    assert np.array_equal(image, other.train[7][0])
    for differs in (one.train[9], one.val[7], Pathfinder(size=24, seed=1).train[7]):
        assert not np.array_equal(image, differs[0])


def test_both_answers_are_as_many():
    source = Pathfinder(train_images=10, val_images=6)
    assert (len(source.train), len(source.val), source.classes) == (10, 6, ["apart", "joined"])
    assert np.bincount(source.train.labels).tolist() == [5, 5]


@pytest.mark.parametrize("size", [32, 97, (24, 40)])
@pytest.mark.parametrize("difficulty", LEVELS)
def test_any_size_shows_two_marks(size, difficulty):
    image, _ = Pathfinder(difficulty, size).val[3]
    height, width = (size, size) if isinstance(size, int) else size
    assert image.size == (width, height)
    pixels = np.asarray(image)[..., 0]
    assert pixels.max() > 230 and 0.02 < (pixels > 60).mean() < 0.4


@pytest.mark.parametrize("difficulty", LEVELS)
def test_paths_share_no_node_and_go_from_neighbour_to_neighbour(difficulty):
    level = LEVELS[difficulty]
    for number in range(20):
        paths = grown(Random(number), level)
        nodes = [node for path in paths for node in path]
        assert len(set(nodes)) == len(nodes) == level.curves * level.nodes
        assert all(0 <= side < level.grid for node in nodes for side in node)
        steps = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for path in paths for a, b in pairwise(path)]
        assert set(steps) == {1}


@pytest.mark.parametrize("difficulty", ["easy", *(pytest.param(n, marks=pytest.mark.full) for n in ("medium", "hard"))])
def test_the_distance_of_the_marks_does_not_tell(difficulty):
    """The same distances, as often, for both answers: 1,000 draws of each differ as much as two halves of one do."""
    level, found = LEVELS[difficulty], {}
    for joined in (False, True):
        distances = []
        for number in range(2000 if joined else 1000):
            paths, ends = marked(Random(number + 10_000 * joined), level, joined)
            assert (ends[0][0] == ends[1][0]) is joined
            one, other = (paths[path][side] for path, side in ends)
            distances.append((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2)
        found[joined] = distances
    parts = [found[False], found[True][:1000], found[True][1000:]]
    shares = [np.bincount(part, minlength=200) / 1000 for part in parts]
    between, within = (np.abs(shares[a] - shares[b]).sum() for a, b in ((0, 1), (1, 2)))
    assert between < 2 * within + 0.02


def test_the_ink_does_not_tell():
    """As many bright pixels on average, whatever the answer."""
    split = Pathfinder("easy", 32).train
    ink = np.array([(np.asarray(split[i][0])[..., 0] > 60).mean() for i in range(200)])
    apart, joined = ink[::2], ink[1::2]
    spread = np.sqrt(apart.var() / 100 + joined.var() / 100)
    assert abs(apart.mean() - joined.mean()) < 4 * spread


def test_an_unknown_difficulty_is_named():
    with pytest.raises(ValueError, match=r"difficulty must be one of easy, medium, hard, got 'heard'; set data.source"):
        Pathfinder("heard")


def test_all_ends_can_be_marked():
    """The first and the last path, and both ends of each."""
    seen = {tuple(sorted(marked(Random(i), LEVELS["easy"], False)[1])) for i in range(100)}
    ends = [(number, side) for number in range(2) for side in (0, -1)]
    assert seen == {tuple(sorted(pair)) for pair in combinations(ends, 2) if pair[0][0] != pair[1][0]}
