"""Digits on a canvas: every image depends on its name alone, and both answers are what the frames hold."""

import numpy as np
import pytest

from data.sources.digits_canvas import FAR, DigitsCanvas


def test_images_depend_on_seed_split_and_index_only():
    one, other = DigitsCanvas(), DigitsCanvas()
    image, label = one.train[7]
    assert image.mode == "RGB" and image.size == (64, 64) and label == 1
    assert np.array_equal(image, other.train[7][0])
    for differs in (one.train[9], one.val[7], DigitsCanvas(seed=1).train[7]):
        assert not np.array_equal(image, differs[0])
    assert (len(one.train), len(one.val), one.classes) == (20_000, 2_000, ["different", "same"])


def test_the_label_says_whether_the_framed_digits_are_the_same(monkeypatch):
    split, shown = DigitsCanvas(digits=3).val, []
    digit_of = {scan.tobytes(): int(digit) for scan, digit in zip(split.scans.pixels, split.scans.labels, strict=True)}
    monkeypatch.setattr(split, "_drawn", lambda scans, places: shown.append((scans, places)))
    labels = [split[index][1] for index in range(200)]
    assert labels == [0, 1] * 100
    framed = [[digit_of[scan.tobytes()] for scan in scans[:2]] for scans, _ in shown]
    assert [int(one == other) for one, other in framed] == labels
    assert {digit for pair in framed for digit in pair} == set(range(10))
    assert all(np.abs(places[0] - places[1]).max() >= FAR for _, places in shown)
    assert all(len({tuple(place) for place in places.tolist()}) == 3 for _, places in shown)


def test_training_and_validation_show_other_scans():
    source = DigitsCanvas()
    assert (len(source.train.scans), len(source.val.scans)) == (1437, 360)


@pytest.mark.parametrize(("size", "cells", "digits"), [(32, 4, 5), ((48, 96), 8, 12), (100, 3, 9)])
def test_any_size_shows_two_frames(size, cells, digits):
    image, _ = DigitsCanvas(size, digits, cells).train[0]
    height, width = (size, size) if isinstance(size, int) else size
    assert image.size == (width, height)
    assert (np.asarray(image)[..., 0] == 255).sum() > 4 * min(height, width) / cells


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"digits": 17}, "digits must be at most 16, got 17; set data.source.cells to more"),
        ({"digits": 1}, "digits must be a whole number of at least 2, got 1"),
        ({"cells": 2}, "cells must be a whole number of at least 3, got 2"),
        ({"size": 12}, "image_size must be at least 16 pixels for 4 digits along a side, got 12; set image_size=64"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(settings, said):
    with pytest.raises(ValueError, match=f"data: digits_canvas: {said}"):
        DigitsCanvas(**settings)
