"""`ImageData` under Lightning: epochs, stages, workers, and runs without surprises."""

import pytest
import torch

from data import Batch
from data.loader import EpochLoader
from data.module import ImageData
from data.sources.decode import UnreadableImage
from data.sources.digits import Digits
from data.sources.fake import Fake
from data.sources.imagefolder import ImageFolder


def images(source=None, **changes):
    plain = {"num_classes": 10, "image_size": 8, "batch_size": 4, "eval": {"squash": True}}
    return ImageData(source or Fake(size=8, train_images=18, val_images=5), **{**plain, **changes})


def test_every_epoch_has_its_own_order_and_number(recorder, trainer):
    model, data = recorder(), images()
    trainer(max_epochs=3).fit(model, data)
    assert [batch[:2] for batch in model.seen] == [(e, n) for e in range(3) for n in range(4)]
    orders = [[i for batch in model.seen[4 * e : 4 * e + 4] for i in batch[2]] for e in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(len(set(order)) == 16 for order in orders)
    assert len(model.seen) == 3 * data.steps_per_epoch()


@pytest.mark.parametrize("augment", [{}, {"shift": 0.25, "mixup": 0.8, "erasing": 0.5}])
def test_two_runs_and_any_number_of_workers_see_the_same(recorder, trainer, augment):
    runs = []
    for workers in (0, 0, 2):
        runs.append(recorder())
        torch.manual_seed(len(runs))
        trainer().fit(runs[-1], images(augment=augment, workers=workers))
    for other in runs[1:]:
        for a, b in zip(runs[0].seen, other.seen, strict=True):
            assert a[:3] == b[:3] and torch.equal(a[3], b[3]) and torch.equal(a[4], b[4])


def test_validation_sees_every_image_once_and_unmixed(recorder, trainer):
    class Checker(recorder):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            assert isinstance(batch, Batch) and batch.labels.ndim == 1 and batch.epoch == 0
            assert batch.images.dtype == torch.float32 and batch.number == batch_idx

        test_step = validation_step

    model, data = Checker(), images(augment={"mixup": 1.0, "erasing": 1.0})
    trainer(max_epochs=1, num_sanity_val_steps=1).fit(model, data)
    assert model.validated == [*range(4), *range(5)]  # the sanity batch, then all
    assert model.seen[0][4].shape == (4, 10)
    model.validated = []
    trainer().test(model, data)
    assert model.validated == list(range(5))


def test_overfitting_repeats_its_batches(recorder, trainer):
    model = recorder()
    trainer(max_epochs=3, overfit_batches=2).fit(model, images())
    assert [batch[2] for batch in model.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


def test_training_does_not_depend_on_loading(recorder, trainer):
    """The model's own randomness is untouched by the loader, whose draws would otherwise shift it."""
    after = []
    for augment in ({}, {"shift": 0.25, "rand_augment": "rand-m9-mstd0.5-inc1", "cutmix": 1.0}):
        torch.manual_seed(0)
        model = recorder()
        trainer().fit(model, images(augment=augment))
        after.append(torch.rand(1).item())
    assert after[0] == after[1]


def test_unreadable_images_are_left_out_of_training_but_not_of_evaluation(recorder, trainer, image_tree):
    root = image_tree(train=5, val=2)
    (root / "train" / "ant" / "2.png").write_bytes(b"")
    data = images(ImageFolder(root), num_classes=2, on_error="skip", batch_size=5, workers=0)
    model = recorder()
    trainer().fit(model, data)
    assert sorted(i for batch in model.seen[:2] for i in batch[2]) == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert data.skipped == 1
    (root / "val" / "ant" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unreadable image, got .*val/ant/1.png"):
        trainer().validate(model, data)


def test_digits_train_without_warnings(recorder, trainer, recwarn):
    data = images(Digits(), image_size=16, batch_size=64, augment={"shift": 0.125})
    model = recorder()
    trainer(max_epochs=1).fit(model, data)
    assert len(model.seen) == data.steps_per_epoch() == 22
    assert model.seen[0][3].shape == (64, 3, 16, 16)
    assert sorted(model.validated) == list(range(360))
    benign = ("does not have many workers", "LeafSpec")
    assert not [str(w.message) for w in recwarn if not any(text in str(w.message) for text in benign)]


def test_loaders_wait_for_workers_only_where_there_are_some():
    loader = images(workers=2, timeout=7).val_dataloader()
    assert isinstance(loader, EpochLoader)
    assert (loader.num_workers, loader.persistent_workers, loader.timeout) == (2, True, 7)
    loader = images(workers="auto").train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.timeout) == (0, False, 0)


def test_auto_workers_share_the_machine(monkeypatch, image_tree):
    data = images(ImageFolder(image_tree()), num_classes=2, batch_size=2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert data.train_dataloader().num_workers == 8
    other = images(ImageFolder(data.source.root), num_classes=2, batch_size=2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert other.train_dataloader().num_workers == 1


def test_what_is_known_before_a_trainer_exists():
    data = images(Fake(train_images=100), batch_size=8)
    assert data.num_classes == 10 and data.class_names[0] == "class 0"
    assert (data.steps_per_epoch(), data.steps_per_epoch(4)) == (12, 3)
    position = {"epoch": 0, "batch": 0, "global_batch": 8, "seed": 0, "images": 100}
    assert data.state_dict() == position | {"begun": [8, 1, 1, 12], "data": data.fingerprint}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence_from_workers_too(image_tree, workers):
    root = image_tree()
    for split in ("train", "val"):
        (root / split / "ant" / "0.png").write_bytes(b"no image")
    data = ImageData(ImageFolder(root), 2, 8, 6, workers=workers)
    with pytest.raises(UnreadableImage, match=r"got .*train/ant/0.png .*; mend .*, or set data.on_error=skip") as error:
        list(data.train_dataloader())
    assert "Traceback" not in str(error.value)
    data = ImageData(ImageFolder(root), 2, 8, 6, workers=workers, on_error="skip")
    with pytest.raises(UnreadableImage, match=r"val/ant/0.png .*; mend or remove the file: an evaluation") as error:
        list(data.val_dataloader())
    assert "Traceback" not in str(error.value) and "on_error" not in str(error.value)


def test_the_smallest_batch_is_known():
    source = Fake(train_images=9)
    assert [ImageData(source, 10, 8, 4, drop_last=last).smallest_batch() for last in (True, False)] == [4, 1]
    data = ImageData(source, 10, 8, 2, drop_last=False)
    assert [data.smallest_batch(world) for world in (1, 2, 3)] == [1, 2, 1]
