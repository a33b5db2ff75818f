"""The order of batches is a function of seed and epoch, the same for any number of processes."""

import numpy as np
import pytest

from data.order.sampler import EpochBatchSampler, EvaluationBatchSampler


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def indices(batches):
    return [[draw.index for draw in batch] for batch in batches]


def test_an_epoch_holds_every_image_once_but_for_the_rest():
    batches = epoch_of(EpochBatchSampler(23, 4, seed=1))
    assert [len(batch) for batch in batches] == [4] * 5
    drawn = [draw.index for batch in batches for draw in batch]
    assert len(set(drawn)) == 20 and set(drawn) <= set(range(23))
    assert [batch[0].number for batch in batches] == list(range(5))


def test_the_last_batch_can_be_kept():
    sampler = EpochBatchSampler(23, 4, seed=1, drop_last=False)
    batches = epoch_of(sampler)
    assert len(sampler) == len(batches) == 6
    assert sorted(draw.index for batch in batches for draw in batch) == list(range(23))


@pytest.mark.parametrize(("length", "batches"), [(9, 2), (10, 3), (11, 3)])
def test_a_kept_last_batch_reaches_every_process_or_none(length, batches):
    sizes = [
        [len(batch) for batch in EpochBatchSampler(length, 2, 0, rank, world=2, drop_last=False)] for rank in (0, 1)
    ]
    assert [len(of_rank) for of_rank in sizes] == [batches, batches]
    assert all(size >= 1 for of_rank in sizes for size in of_rank)


def test_order_depends_on_seed_and_epoch_only():
    first = epoch_of(EpochBatchSampler(50, 5, seed=1), 3)
    assert first == epoch_of(EpochBatchSampler(50, 5, seed=1), 3)
    assert indices(first) != indices(epoch_of(EpochBatchSampler(50, 5, seed=1), 4))
    assert indices(first) != indices(epoch_of(EpochBatchSampler(50, 5, seed=2), 3))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_global_batches_are_the_same_for_any_number_of_processes(repeats, world):
    whole = epoch_of(EpochBatchSampler(41, 8, seed=1, repeats=repeats))
    parts = [epoch_of(EpochBatchSampler(41, 8 // world, 1, rank, world, repeats)) for rank in range(world)]
    for number, batch in enumerate(whole):
        assert sorted(batch) == sorted(draw for part in parts for draw in part[number])
    assert all(len(part) == len(whole) for part in parts)


@pytest.mark.parametrize("repeats", [1, 3])
def test_accumulated_batches_are_those_of_as_many_processes(repeats):
    """One process that accumulates four batches, two that accumulate two, and four: the same batches."""

    def drawn_by(world, accumulated):
        ranks = [EpochBatchSampler(50, 3, 5, rank, world, repeats, accumulated=accumulated) for rank in range(world)]
        return [[(d.index, d.repeat) for d in batch] for step in zip(*ranks, strict=True) for batch in step]

    wanted, alone = drawn_by(4, 1), drawn_by(1, 4)
    assert alone[: len(wanted)] == wanted and len(wanted) == 16
    assert drawn_by(2, 2)[:16] == wanted
    if repeats == 1:  # what makes no whole step is not lost
        drawn = [draw for batch in alone for draw in batch]
        assert len(drawn) == len(set(drawn)) == 48


def test_starting_at_a_batch_skips_the_ones_before_once():
    sampler = EpochBatchSampler(23, 4, seed=1)
    whole = epoch_of(sampler, 2)
    sampler.start_epoch, sampler.start_batch = 2, 3
    sampler.set_epoch(0)
    assert len(sampler) == 5
    assert list(sampler) == whole[3:]
    assert epoch_of(sampler, 2) == whole


def test_an_iterator_that_is_thrown_away_uses_nothing_up():
    sampler = EpochBatchSampler(23, 4, seed=1)
    sampler.start_batch = 3
    iter(sampler)
    assert [batch[0].number for batch in sampler] == [3, 4]


def test_without_shuffling_every_epoch_is_the_sources_order():
    sampler = EpochBatchSampler(8, 4, seed=1, shuffle=False)
    assert indices(epoch_of(sampler, 5)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_repeated_augmentation_shows_copies_in_a_row_and_a_third_of_the_images():
    batches = epoch_of(EpochBatchSampler(30, 6, seed=1, repeats=3))
    assert len(batches) == 5
    for batch in batches:
        assert [draw.repeat for draw in batch] == [0, 1, 2] * 2
        assert len({draw.index for draw in batch}) == 2
    assert len({draw.index for batch in batches for draw in batch}) == 10


@pytest.mark.parametrize(("length", "world", "batch"), [(1000, 2, 16), (1281, 4, 8), (600, 1, 32)])
def test_repeated_augmentation_has_the_length_and_split_of_timms_sampler(length, world, batch):
    from timm.data.distributed_sampler import RepeatAugSampler

    for rank in range(world):
        theirs = RepeatAugSampler(range(length), world, rank, shuffle=False)
        ours = EpochBatchSampler(length, batch, 0, rank, world, repeats=3, shuffle=False)
        drawn = [index for part in indices(ours) for index in part]
        assert len(ours) == len(theirs) // batch
        assert drawn == list(theirs)[: len(drawn)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once_on_any_number_of_processes(world):
    parts = [list(EvaluationBatchSampler(10, 4, rank, world)) for rank in range(world)]
    drawn = [draw for part in parts for batch in part for draw in batch]
    assert sorted(draw.index for draw in drawn) == list(range(10))
    assert {(draw.epoch, draw.repeat) for draw in drawn} == {(0, 0)}
    assert all(len(part) == len(EvaluationBatchSampler(10, 4, rank, world)) for rank, part in enumerate(parts))


def test_balanced_epochs_have_as_many_of_every_class():
    labels = np.array([0] * 13 + [1] * 5 + [2] * 2)

    def epoch(number, start=0, world=1, rank=0):
        sampler = EpochBatchSampler(20, 5 // world if world > 1 else 5, 3, rank, world, labels=labels)
        sampler.start_epoch, sampler.start_batch = number, start
        return [draw.index for batch in sampler for draw in batch]

    for number in range(3):
        drawn = epoch(number)
        counts = np.bincount(labels[drawn])
        assert len(drawn) == 20 and sorted(counts.tolist()) == [6, 7, 7]
        assert len({i for i in drawn if labels[i] == 0}) == counts[0]  # none twice while others wait
        assert {i for i in drawn if labels[i] == 1} == set(range(13, 18))
        assert epoch(number) == drawn and epoch(number, start=2) == drawn[10:]
    assert epoch(0) != epoch(1)
