"""A run that is interrupted and resumed sees the batches, bit for bit, that an uninterrupted one would have seen."""

import pytest
import torch

from data.module import ImageData
from data.sources.fake import Fake

AUGMENT = {
    "shift": 0.25,
    "hflip": 0.5,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}
STEPS = 4  # of an epoch


def images(workers=0, batch_size=4, seed=3, repeated=1, length=18):
    source = Fake(num_classes=10, size=8, train_images=length, val_images=5)
    augment = {**AUGMENT, "repeated": repeated}
    return ImageData(source, 10, 8, batch_size, seed=seed, augment=augment, eval={"squash": True}, workers=workers)


def same(left, right):
    assert [batch[:3] for batch in left] == [batch[:3] for batch in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a[3], b[3])
        assert torch.equal(a[4], b[4])


@pytest.fixture
def whole(recorder, trainer, tmp_path):
    """Three epochs without interruption, and a checkpoint after each step."""
    model = recorder({step: tmp_path / f"{step}.ckpt" for step in range(1, 3 * STEPS)})
    trainer(max_epochs=3).fit(model, images())
    assert [batch[:2] for batch in model.seen] == [(e, n) for e in range(3) for n in range(STEPS)]
    return model.seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 2, 2 * STEPS])
def test_resumed_run_sees_the_batches_that_follow(whole, recorder, trainer, tmp_path, step, workers):
    model = recorder()
    trainer(max_epochs=3).fit(model, images(workers), ckpt_path=tmp_path / f"{step}.ckpt")
    same(model.seen, whole[step:])


def test_position_of_every_step(whole, tmp_path):
    for step in range(1, 3 * STEPS):
        state = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["ImageData"]
        assert (state["epoch"], state["batch"]) == divmod(step, STEPS)


def test_interrupted_twice(whole, recorder, trainer, tmp_path):
    second = recorder({7: tmp_path / "again.ckpt"})
    trainer(max_epochs=3).fit(second, images(), ckpt_path=tmp_path / "2.ckpt")
    third = recorder()
    trainer(max_epochs=3).fit(third, images(), ckpt_path=tmp_path / "again.ckpt")
    same(third.seen, whole[7:])


def test_saved_by_a_callback_in_validation_and_after_the_fit(whole, recorder, trainer, tmp_path):
    class SaveInValidation(recorder):
        def on_validation_end(self):
            self.trainer.save_checkpoint(tmp_path / f"validated{self.trainer.current_epoch}.ckpt")

    run = trainer(max_epochs=2)
    run.fit(SaveInValidation(), images())
    run.save_checkpoint(tmp_path / "finished.ckpt")
    for name, done in (("validated0", STEPS), ("validated1", 2 * STEPS), ("finished", 2 * STEPS)):
        model = recorder()
        trainer(max_epochs=3).fit(model, images(), ckpt_path=tmp_path / f"{name}.ckpt")
        same(model.seen, whole[done:])


def test_limited_epochs_resume_too(recorder, trainer, tmp_path):
    options = {"max_epochs": 3, "limit_train_batches": 3}
    model = recorder({step: tmp_path / f"{step}.ckpt" for step in (2, 3)})
    trainer(**options).fit(model, images())
    for step in (2, 3):
        resumed = recorder()
        trainer(**options).fit(resumed, images(), ckpt_path=tmp_path / f"{step}.ckpt")
        same(resumed.seen, model.seen[step:])


def test_repeated_augmentation_resumes_too(recorder, trainer, tmp_path):
    model = recorder({3: tmp_path / "3.ckpt"})
    trainer().fit(model, images(repeated=3))
    resumed = recorder()
    trainer().fit(resumed, images(repeated=3), ckpt_path=tmp_path / "3.ckpt")
    same(resumed.seen, model.seen[3:])


@pytest.mark.parametrize(
    ("change", "name"), [({"batch_size": 2}, "global_batch"), ({"seed": 4}, "seed"), ({"length": 19}, "images")]
)
def test_resuming_needs_the_same_batches(whole, recorder, trainer, tmp_path, change, name):
    with pytest.raises(
        ValueError, match=f"the checkpoint is at batch 2 of epoch 0, counted with {name}=.*, got {name}="
    ):
        trainer(max_epochs=3).fit(recorder(), images(**change), ckpt_path=tmp_path / "2.ckpt")


def test_a_second_fit_starts_afresh(recorder, trainer, tmp_path, whole):
    data = images()
    trainer(max_epochs=3).fit(recorder(), data, ckpt_path=tmp_path / "2.ckpt")
    model = recorder()
    trainer(max_epochs=3).fit(model, data)
    same(model.seen, whole)


def test_no_warning_that_the_loader_cannot_resume(whole, recorder, trainer, tmp_path, recwarn):
    trainer(max_epochs=3).fit(recorder(), images(), ckpt_path=tmp_path / "2.ckpt")
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


def test_evaluating_a_checkpoint_takes_any_batch_size(whole, recorder, trainer, tmp_path):
    model = recorder()
    trainer().validate(model, images(batch_size=2, seed=9), ckpt_path=tmp_path / "2.ckpt")
    assert model.validated == list(range(5))
