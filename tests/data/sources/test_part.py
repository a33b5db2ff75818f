"""A part of the training images, of every kind of source."""

import numpy as np
import pytest

from data.module import ImageData
from data.order.sampler import EpochBatchSampler
from data.sources.digits import Digits
from data.sources.imagefolder import ImageFolder
from data.sources.split_file import take_split


def images(source, subset, **changes):
    settings = {"num_classes": 10, "image_size": 8, "batch_size": 2, "seed": 0} | changes
    return ImageData(source, subset=subset, **settings)


def test_a_share_of_each_class():
    data = images(Digits(), "10%")
    data.check()
    assert np.bincount(data.source.train.labels).tolist() == [14, 15, 14, 15, 15, 15, 15, 14, 14, 14]
    assert len(data.source.val) == 360 and data.source.embedded and data.class_names == Digits().classes
    assert data.notes() == ["data.subset: 10% of each class, 145 of 1437 training images"]
    image, label = data.source.train[20]
    number = int(data.source.train._chosen[20])
    whole = Digits().train
    assert np.array_equal(image, whole[number][0]) and label == whole.labels[number]


def test_so_many_of_each_class_of_files(image_tree):
    data = images(ImageFolder(image_tree(train=5)), 2, num_classes=2)
    data.check()
    assert data.source.train.labels.tolist() == [0, 0, 1, 1]
    assert data.source.train.relative_path(3).startswith("bee/")
    assert data.notes() == ["data.subset: 2 images of each class, 4 of 10 training images"]
    assert images(ImageFolder(image_tree(train=5)), 50, num_classes=2).source.train.labels.tolist() == [0] * 5 + [1] * 5


def test_the_seed_names_it_and_a_larger_part_holds_a_smaller_one():
    def chosen(subset, seed=0):
        return set(images(Digits(), subset, seed=seed).source.train._chosen.tolist())

    assert chosen("5%") < chosen("10%") and chosen(3) < chosen(4)
    assert chosen(3) != chosen(3, seed=1)


def test_batches_are_of_the_part():
    data = images(Digits(), 1)
    batches = list(data.train_dataloader())
    assert len(batches) == 5 and sorted(torch_labels(batches)) == list(range(10))
    assert isinstance(data.train_dataloader().batch_sampler, EpochBatchSampler)


def torch_labels(batches):
    return [int(label) for batch in batches for label in batch.labels]


def test_the_split_of_a_run_reaches_the_source(image_tree, tmp_path):
    (tmp_path / "split.csv").touch()
    data = images(ImageFolder(image_tree()), "50%")
    take_split(data.source, tmp_path)
    assert data.source.whole.split == tmp_path / "split.csv"


@pytest.mark.parametrize("subset", ["10", "0%", "120%", "ten", 0, -1, 0.1, True])
def test_what_is_no_part(subset):
    with pytest.raises(ValueError, match=r"data.subset: got .*; give a share such as 10%, images per class such as 50"):
        images(Digits(), subset).check()
