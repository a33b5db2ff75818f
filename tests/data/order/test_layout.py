"""A run goes on with other processes and batches: the same images in every step, each once in an epoch."""

from itertools import product

import numpy as np
import pytest

from data.order.layout import Layout
from data.order.sampler import EpochBatchSampler

PROCESSES = (1, 2, 4, 8)
IMAGES = 64  # of a step
LENGTH = 500


def begun_with(processes, batch, accumulated, length=LENGTH, limit=None, **settings):
    """The layout of a run that begins so, and what its steps see in epoch 3."""
    sampler = EpochBatchSampler(length, batch, 1, 0, processes, accumulated=accumulated, **settings)
    layout = Layout(batch, processes, accumulated, min(len(sampler), limit or len(sampler)))
    return layout, steps(layout, layout, length, **settings)


def steps(begun, now, length=LENGTH, start=0, **settings):
    """Of each step its batches, ordered: first those of all processes, then those accumulated. A batch is its draws."""
    anew = {} if now[:3] == begun[:3] else {"begun": begun}
    drawn = []
    for rank in range(now.processes):
        keywords = settings | anew | {"accumulated": now.accumulated}
        sampler = EpochBatchSampler(length, now.batch, 1, rank, now.processes, **keywords)
        sampler.start_epoch, sampler.start_batch = 3, start * now.accumulated
        drawn.append(list(sampler)[: now.batches - start * now.accumulated])
    numbers = range(len(drawn[0]))
    assert all(len(of_rank) == len(numbers) for of_rank in drawn)
    parts = [numbers[first : first + now.accumulated] for first in range(0, len(numbers), now.accumulated)]
    return [[drawn[rank][number] for number in part for rank in range(now.processes)] for part in parts]


def seen(step):
    return sorted((draw.index, draw.repeat) for batch in step for draw in batch)


def batches(step):
    return [[(draw.index, draw.repeat) for draw in batch] for batch in step]


@pytest.mark.case(25)
@pytest.mark.parametrize("settings", [{}, {"repeats": 3}, {"shuffle": False}, {"blocks": np.full(10, 50)}], ids=str)
def test_any_number_of_processes_goes_on_with_the_steps_of_any_other(settings):
    """16 pairs of {1, 2, 4, 8} processes, batches as they were or smaller, accumulation makes up the step."""
    for before, after in product(PROCESSES, PROCESSES):
        begun, whole = begun_with(before, 8, IMAGES // (8 * before), **settings)
        for batch in (8, 4):
            now = begun.shared_anew(batch, after, IMAGES // (batch * after))
            if now is None:
                continue
            found = steps(begun, now, **settings)
            assert [seen(step) for step in found] == [seen(step) for step in whole]
            if batch == 8 and before != after:
                assert [batches(step) for step in found] == [batches(step) for step in whole]
            drawn = [draw for step in found for draw in seen(step)]
            assert len(drawn) == len(set(drawn))
            rest = steps(begun, now, start=2, **settings)
            assert [batches(step) for step in rest] == [batches(step) for step in found[2:]]


@pytest.mark.case(25)
def test_every_pair_can_be_made_where_an_epoch_has_whole_steps():
    made = 0
    for before, after in product(PROCESSES, PROCESSES):
        limit = LENGTH // IMAGES * (IMAGES // (8 * before))
        begun, _ = begun_with(before, 8, IMAGES // (8 * before), limit=limit)
        made += begun.shared_anew(8, after, IMAGES // (8 * after)) is not None
    assert made == 16


@pytest.mark.case(25)
def test_a_shorter_step_at_the_end_of_an_epoch():
    """Of 500 images 7 steps of 64 leave 52: six batches of 8 where steps are accumulated."""
    begun, whole = begun_with(1, 8, 8)
    assert begun.batches == 62 and len(whole[-1]) == 6
    for processes, can in ((2, True), (4, False), (8, False)):
        now = begun.shared_anew(8, processes, 8 // processes)
        assert (now is not None) == can
        if can:
            assert [batches(step) for step in steps(begun, now)] == [batches(step) for step in whole]
    halves = begun.shared_anew(4, 4, 4)  # twice as many batches of half the size
    assert [seen(step) for step in steps(begun, halves)] == [seen(step) for step in whole]
    assert [len(batch) for batch in steps(begun, halves)[-1]] == [4] * 12


@pytest.mark.case(25)
def test_the_last_batch_that_is_not_full():
    """On 8 processes 52 images are 6 or 7 for each, and the same dealt as two batches of four processes."""
    begun, whole = begun_with(8, 8, 1, drop_last=False)
    assert sorted(len(batch) for batch in whole[-1]) == [6] * 4 + [7] * 4
    for processes in (1, 2, 4):
        now = begun.shared_anew(8, processes, 8 // processes)
        assert [batches(step) for step in steps(begun, now, drop_last=False)] == [batches(step) for step in whole]
    drawn = [draw for step in whole for draw in seen(step)]
    assert len(drawn) == len(set(drawn)) == LENGTH


@pytest.mark.case(25)
def test_a_balanced_epoch():
    labels = np.arange(LENGTH) % 7 % 3
    begun, whole = begun_with(2, 16, 2, labels=labels, limit=14)
    now = begun.shared_anew(16, 4, 1)
    assert [batches(step) for step in steps(begun, now, labels=labels)] == [batches(step) for step in whole]


def test_batches_keep_their_names():
    """The randomness of a batch is that of the number and the process that it had."""
    begun, _ = begun_with(4, 8, 2, limit=14)
    now = begun.shared_anew(8, 2, 4)
    names = [[batch[0].named for batch in step] for step in steps(begun, now)]
    assert names[1] == [(2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert {batch[0].named for step in steps(begun, begun) for batch in step} == {None}


def test_images_of_a_step_stay():
    assert Layout(8, 2, 4, 12).images == 64 and str(Layout(8, 2, 4, 12)) == "8 x 2 x 4"
    assert Layout(8, 2, 4, 12).shared_anew(8, 2, 2) is None
    assert Layout(8, 2, 4, 12).shared_anew(8, 8, 1) == Layout(8, 8, 1, 3)


@pytest.mark.case(25)
def test_going_on_takes_as_long_anywhere_in_an_epoch(monkeypatch):
    """Counted: how many batches are made before the first one, and how often an order is drawn."""
    sampler, orders, made = EpochBatchSampler(100_000, 10, 1), [], []
    order, positions = EpochBatchSampler._order, EpochBatchSampler._positions
    monkeypatch.setattr(EpochBatchSampler, "_order", lambda *a: orders.append(1) or order(*a))
    monkeypatch.setattr(EpochBatchSampler, "_positions", lambda *a: made.append(1) or positions(*a))
    for start in (0, 5_000, 9_999):
        orders.clear(), made.clear()
        sampler.start_batch = start
        assert next(iter(sampler))[0].number == start
        assert len(orders) == 1 and len(made) == 1
