"""The pre-flight finds everything that is wrong, in one message, before training."""

import shutil

import pytest

from data.module import ImageData
from data.sources.digits import Digits
from data.sources.fake import Fake
from data.sources.imagefolder import ImageFolder


def images(source=None, **changes):
    return ImageData(
        **{"source": source or Fake(size=8), "num_classes": 10, "image_size": 8, "batch_size": 4, **changes}
    )


def test_good_settings_pass():
    images().check()
    images(Digits(), seed=5, workers=2, on_error="skip", timeout=0).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "data.num_classes: got 0; give a whole number from 1"),
        ({"image_size": 32.0}, "data.image_size: got 32.0; give"),
        ({"batch_size": "64"}, "data.batch_size: got '64'; give"),
        ({"seed": -1}, "seed: got -1; give a whole number from 0"),
        ({"workers": "all"}, "data.workers: got 'all'; give a whole number from 0, or auto"),
        ({"on_error": "ignore"}, "data.on_error: got 'ignore'; give raise or skip"),
        ({"drop_last": None}, "data.drop_last: got None; give true or false"),
        ({"timeout": -1}, "data.timeout: got -1; give seconds"),
        ({"mean": [0.5]}, r"data.mean: got \(0.5,\); give three numbers"),
        ({"mean": 0.5}, "data.mean: got 0.5; give three numbers"),
        ({"image_size": [8, 0]}, r"data.image_size: got \(8, 0\); give a whole number from 1, or \[height, width\]"),
        ({"seed": 2**32}, "seed: got 4294967296; give a whole number from 0 to 4294967295"),
        ({"std": [0.5, 0.5, 0]}, r"data.std: got \(0.5, 0.5, 0\); give three positive numbers"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        images(**changes).check()


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as error:
        images(batch_size=0, seed="x", on_error="").check()
    assert str(error.value).startswith("ImageData: 3 problem(s) with the data\n  - data.batch_size")
    assert len(str(error.value).splitlines()) == 4


def test_fewer_images_than_a_batch():
    message = "data.batch_size: got 32 on 1 process.*, 32 images in all, .* has 20; set data.batch_size=20 or"
    with pytest.raises(ValueError, match=message):
        images(Fake(train_images=20), batch_size=32).check()
    images(Fake(train_images=20), batch_size=20).check()
    images(Fake(train_images=20), batch_size=32, drop_last=False).check()


def test_more_classes_than_the_model_has():
    with pytest.raises(ValueError, match=r"data.num_classes: got 3, .* 10 classes \(0, 1, 2, 3, 4 and 5 more"):
        images(Digits(), num_classes=3).check()


def test_labels_out_of_range():
    source = Fake()
    source.val.labels[3] = -1
    with pytest.raises(ValueError, match=r"the val split has labels from -1 to 9, .* 10 classes allow 0 to 9; mend"):
        images(source).check()
    source = Fake()
    source.train.labels[3] = 10
    with pytest.raises(ValueError, match="the train split has labels from 0 to 10, but"):
        images(source).check()


def test_empty_split_and_class(image_tree):
    root = image_tree(("ant", "bee", "cow"))
    for file in (root / "train" / "bee").iterdir():
        file.unlink()
    shutil.rmtree(root / "val")
    (root / "val" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError) as error:
        images(ImageFolder(root), batch_size=1).check()
    assert r"the train split has no image of 1 class(es): bee; add images or remove" in str(error.value)
    assert "the val split has no images" in str(error.value)


def test_missing_folder_is_found_in_setup(tmp_path):
    with pytest.raises(ValueError, match=r"1 problem\(s\) with the data\n  - data.root: no folder .*nowhere"):
        images(ImageFolder(tmp_path / "nowhere")).setup("fit")


def test_lightnings_own_sampler_is_refused_on_several_processes(trainer):
    data = images()
    data.trainer = trainer(devices=2, strategy="ddp", use_distributed_sampler=True)
    with pytest.raises(ValueError, match=r"trainer.use_distributed_sampler: got true .*; set it to false"):
        data.check()
    data.trainer = trainer(devices=2, strategy="ddp", use_distributed_sampler=False)
    data.check()
    assert data.steps_per_epoch(2) == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mean": [123.675, 116.28, 103.53]},
            r"data.mean: got \[123.675.*divide by 255: data.mean=\[0.485,0.456,0.406\]",
        ),
        (
            {"std": [58.395, 57.12, 57.375]},
            r"data.std: got .* scaled to 0 … 1; divide by 255: data.std=\[0.229,0.224,0.22",
        ),
        ({"mean": [-0.5, 0.5, 0.5]}, "data.mean: got .* scaled to 0 … 1; see conf/data"),
    ],
)
def test_mean_and_std_are_of_images_scaled_to_one(changes, message):
    with pytest.raises(ValueError, match=message):
        images(**changes).check()
    images(mean=[0, 1, 0.5], std=[1, 1, 1]).check()


def test_an_evaluation_does_not_see_beyond_the_image():
    message = "data.eval.resize: got 256, but the model sees 384 pixels of it; set data.eval.resize=384 or more"
    for given in ({"image_size": 384}, {"image_size": 8, "eval": {"size": 384, "resize": 256}}):
        with pytest.raises(ValueError, match=message):
            images(**{"eval": {"resize": 256}, **given}).check(training=False)
    with pytest.raises(ValueError, match=r"got 7, but the model sees 8 x 12 pixels"):
        images(image_size=[8, 12], eval={"resize": 7, "squash": True}).check()
    images(image_size=[8, 12], eval={"resize": 8}).check()


def test_every_process_has_an_image_to_evaluate(trainer):
    data = images(Fake(size=8, val_images=1))
    data.trainer = trainer(devices=2, strategy="ddp")
    with pytest.raises(ValueError, match=r"the val split has 1 image\(s\) for 2 processes.*set trainer.devices=1"):
        data.check()
