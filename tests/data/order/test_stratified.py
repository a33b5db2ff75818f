"""What is held out depends on seed and name alone, takes the same share of every class, and hardly moves."""

import numpy as np
import pytest

from data.order.stratified import check_fraction, held_out, part


def named(*counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    return labels, [f"{label}/{number}.jpg" for label, count in enumerate(counts) for number in range(count)]


def test_the_same_share_of_every_class():
    labels, names = named(40, 10, 2, 1, 3)
    assert np.bincount(labels[held_out(labels, names, 0.2, seed=0)], minlength=5).tolist() == [8, 2, 1, 0, 1]
    assert np.bincount(labels[held_out(labels, names, 0.9, seed=0)], minlength=5).tolist() == [36, 9, 1, 0, 2]
    assert held_out(labels, names, 1, seed=0).all()


def test_the_choice_is_that_of_every_machine():
    labels, names = named(5, 5)
    assert np.flatnonzero(held_out(labels, names, 0.4, seed=0)).tolist() == [1, 2, 6, 9]
    assert np.flatnonzero(held_out(labels, names, 0.4, seed=1)).tolist() != [1, 2, 6, 9]


def test_order_and_type_of_names_do_not_matter():
    labels, names = named(30, 20)
    mask = held_out(labels, names, 0.2, seed=3)
    order = np.random.default_rng(0).permutation(len(labels))
    assert np.array_equal(held_out(labels[order], [names[i].encode() for i in order], 0.2, seed=3), mask[order])


def test_composed_and_decomposed_letters_are_the_same_name():
    labels = np.zeros(8, int)
    names = [f"é{number}" for number in range(8)]
    apart = [name.replace("é", "e\u0301") for name in names]
    assert np.array_equal(held_out(labels, names, 0.5, 0), held_out(labels, apart, 0.5, 0))


def test_added_files_move_few_others():
    labels, names = named(100, 100)
    before = {name for name, chosen in zip(names, held_out(labels, names, 0.2, 0), strict=True) if chosen}
    labels, names = named(110, 110)
    after = {name for name, chosen in zip(names, held_out(labels, names, 0.2, 0), strict=True) if chosen}
    assert len(after) == 44 and len(before - after) <= 4  # of 40; as many as new files took places


def test_a_part_is_a_share_or_a_number_of_each_class():
    labels, names = named(40, 10, 1)
    assert np.bincount(labels[part(labels, names, "10%", 0)]).tolist() == [4, 1, 1]
    assert np.bincount(labels[part(labels, names, 5, 0)]).tolist() == [5, 5, 1]
    assert set(part(labels, names, "10%", 0)) < set(part(labels, names, "20%", 0)) < set(range(51))
    assert set(part(labels, names, "20%", 0)) != set(np.flatnonzero(held_out(labels, names, 0.2, 0)))


@pytest.mark.parametrize("value", [0, -0.1, 1.5, "0.2", True, None, float("nan")])
def test_what_is_no_share(value):
    with pytest.raises(ValueError, match=r"data.val_fraction: must be a share above 0 and below 1 .*, got .*; set"):
        check_fraction(value, "data.val_fraction")
