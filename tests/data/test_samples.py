"""A sample is a function of its draw: not of the worker that read it, nor of what was read before."""

import logging
import pickle
import random

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from data.augment import Augment
from data.batch import collate
from data.dataset import Samples, Skips
from data.order.randomness import generator, preserved, seed_all
from data.order.sampler import Draw, EpochBatchSampler
from data.sources.decode import UnreadableImage
from data.sources.fake import Fake
from data.sources.imagefolder import ImageFolder
from data.transforms import TrainTransform

STRONG = Augment(scale=(0.1, 1.0), hflip=0.5, color_jitter=0.4, rand_augment="rand-m9-mstd0.5-inc1", shift=0.2)


@pytest.fixture
def samples():
    return Samples(Fake(size=16).train, TrainTransform(STRONG, 12, (0.5,) * 3), seed=1)


@pytest.fixture
def spoiled(image_tree):
    """Six images, of which numbers 1 and 4 are not."""
    root = image_tree(train=3)
    for name in ("ant/1.png", "bee/1.png"):
        (root / "train" / name).write_text("not an image")
    return ImageFolder(root).train


def state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def loaded(samples, workers, drop_last=True):
    sampler = EpochBatchSampler(20, 4, seed=1, drop_last=drop_last)
    return list(DataLoader(samples, batch_sampler=sampler, collate_fn=collate, num_workers=workers))


def test_a_sample_depends_on_its_draw_alone(samples):
    first = samples[Draw(2, 5, 0)].image
    samples[Draw(2, 6, 0)]
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(samples[Draw(2, 5, 0, number=9)].image, first)
    for other in (Draw(3, 5, 0), Draw(2, 5, 1)):
        assert not torch.equal(samples[other].image, first)
    assert torch.equal(samples.__getitems__([Draw(0, 1), Draw(2, 5, 0)])[1].image, first)


def test_reading_leaves_the_global_generators_alone(samples):
    before = state()
    samples[Draw(0, 1)]
    assert state() == before


def test_preserved_restores_after_an_error():
    before = state()
    with pytest.raises(KeyError), preserved():
        seed_all(1, 2, 3)
        raise KeyError
    assert state() == before


def test_seeds_reach_all_three_generators():
    drawn = set()
    with preserved():
        for name in ((1, 2), (1, 3)):
            seed_all(*name)
            drawn |= {random.random(), float(np.random.rand()), float(torch.rand(1))}
    assert len(drawn) == 6
    assert generator(1, 2).random() == generator(1, 2).random() != generator(2, 1).random()


def test_workers_change_nothing(samples):
    alone, together = loaded(samples, 0), loaded(samples, 2)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.indices, b.indices)
        assert (a.epoch, a.number) == (b.epoch, b.number)


def test_a_batch_has_the_contracts_types(samples):
    batch = loaded(samples, 0)[3]
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, 12, 12)
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert torch.equal(batch.labels, batch.indices % 10)
    assert (batch.epoch, batch.number) == (0, 3)


def test_unreadable_images_stop_the_run(spoiled):
    plain = Samples(spoiled, TrainTransform(Augment(), 8, (0.5,) * 3), seed=1)
    batches = [[Draw(0, i) for i in range(6)]]
    with pytest.raises(UnreadableImage, match=r"unreadable image, got .*train/ant/1.png"):
        list(DataLoader(plain, batch_sampler=batches, collate_fn=collate))


def test_the_error_comes_out_of_a_worker_as_it_is():
    try:
        raise UnreadableImage("read_image: unreadable image, got a.png")
    except UnreadableImage:
        wrapped = ExceptionWrapper(where="in a worker")
    with pytest.raises(UnreadableImage, match=r"got a.png"):
        pickle.loads(pickle.dumps(wrapped)).reraise()


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_can_be_left_out(spoiled, workers, caplog):
    skips = Skips(spoiled.labels, 0.001)
    samples = Samples(spoiled, TrainTransform(Augment(), 8, (0.5,) * 3), seed=1, skips=skips)
    batches = [[Draw(e, i) for i in range(6)] for e in range(3)]
    with caplog.at_level(logging.WARNING):
        read = list(DataLoader(samples, batch_sampler=batches, collate_fn=collate, num_workers=workers))
    assert [batch.indices.tolist() for batch in read] == [[0, 2, 3, 5]] * 3
    assert skips.count == 2
    if workers == 0:
        reported = [record.getMessage() for record in caplog.records]
        assert len(reported) == 2
        assert "left out, on_error=skip:" in reported[0] and "ant/1.png" in reported[0] and "bee/1.png" in reported[1]


def test_a_batch_is_never_empty():
    with pytest.raises(ValueError, match="ImageData: no image of this batch is readable, got 2 unreadable files"):
        collate([None, None])
