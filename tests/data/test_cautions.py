"""What is seldom meant is said before the first step, with the number of images that it is about."""

import numpy as np
import pytest
from PIL import Image

from data.module import ImageData
from data.sources.fake import Fake
from data.sources.imagefolder import ImageFolder
from data.sources.part import Part


def images(source=None, **changes):
    given = {"num_classes": 10, "image_size": 8, "batch_size": 64, **changes}
    return ImageData(source or Fake(train_images=160), **given)


def test_photos_much_larger_than_the_input_are_named(image_tree):
    root = image_tree(size=(500, 375))
    (root / "train" / "ant" / "0.png").write_bytes(b"no image")  # its reading says so
    data = images(ImageFolder(root), num_classes=2, image_size=32, batch_size=3)
    (warning,) = data.warnings()
    assert "images are about 500 x 375 pixels, the model sees 32; choose a model for photos, such as model=" in warning
    assert images(ImageFolder(root), num_classes=2, image_size=224, batch_size=3).warnings() == []
    part = Part(ImageFolder(root), 2, 0)
    assert images(part, num_classes=2, image_size=32, batch_size=4).warnings() == [warning]
    assert images(Part(Fake(10), 2, 0), batch_size=20).warnings() == []  # images of no files have no headers
    assert images(ImageFolder(image_tree(size=(60, 80))), num_classes=2, image_size=32, batch_size=3).warnings() == []


@pytest.mark.parametrize(
    ("changes", "world", "left_out"),
    [({}, 1, 32), ({"drop_last": False}, 1, 0), ({"batch_size": 40}, 1, 0), ({}, 2, 32), ({"batch_size": 53}, 3, 1)],
)
def test_images_that_fill_no_batch_are_counted(changes, world, left_out):
    data = images(**changes)
    found = data.warnings(world)
    assert bool(found) == bool(left_out)
    if left_out:
        batch = data.batch_size * world
        assert f"{left_out} of 160 training images are left out of every epoch" in found[0]
        assert f"because they fill no batch of {batch}; data.drop_last=false takes them in" in found[0]
        assert data.steps_per_epoch(world) * batch == 160 - left_out


def test_a_validation_set_of_one_class_is_named():
    source = Fake(3, train_images=64, val_images=5)
    source.val.labels[:] = 2
    (warning,) = images(source, num_classes=3).warnings()
    assert "all images for validation are of one class, class 2: a model that always says so" in warning
    assert images(Fake(1, train_images=64, val_images=5), num_classes=1).warnings() == []


def test_only_headers_are_read(tmp_path):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (folder := tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(folder / "a.png")
            content = (folder / "a.png").read_bytes()
            (folder / "a.png").write_bytes(content[:60])  # nothing behind the header
    data = images(ImageFolder(tmp_path), num_classes=2, batch_size=2)
    assert "about 300 x 300 pixels" in data.warnings()[0]
