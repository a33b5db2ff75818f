"""The probes of data: every unreadable image, copy and class is found, and pictures show what the model is given."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.module import ImageData
from data.sources.digits import Digits
from data.sources.fake import Fake
from data.sources.imagefolder import ImageFolder
from models.probes.check_data import check_data
from models.probes.reading.images import visible
from models.probes.show_data import in_words, show_data


@pytest.fixture
def photos(tmp_path):
    """Nine photos of two classes, of which one is broken, one a copy in its class, one in the other, one in val."""
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in ("ant", "bee"):
            (folder := tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (10, 12 + i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    shutil.copy(tmp_path / "train/ant/0.png", tmp_path / "train/ant/9.png")
    shutil.copy(tmp_path / "train/ant/1.png", tmp_path / "train/bee/9.png")
    shutil.copy(tmp_path / "train/bee/2.png", tmp_path / "val/bee/9.png")
    (tmp_path / "val/ant/8.png").write_bytes(b"no image")
    return ImageFolder(tmp_path)


def test_all_that_is_wrong_with_a_folder_is_found(photos):
    report = check_data(ImageData(photos, 2, 8, 2), threads=2)
    assert report.figures == {
        **{"images_train": 8, "images_val": 4, "unreadable": 1, "copies_within": 2, "copies_between": 1},
        "copies_of_other_classes": 1,
    }
    assert report.tables["classes"] == [{"class": "ant", "train": 4, "val": 2}, {"class": "bee", "train": 4, "val": 2}]
    (broken,) = report.tables["unreadable"]
    assert (broken["split"], broken["file"]) == ("val", "ant/8.png") and "cannot identify" in broken["reason"]
    pairs = {(row["file"], row["same_as"], row["of_class"]) for row in report.tables["copies"]}
    assert pairs == {
        ("ant/9.png", "ant/0.png", "ant"),
        ("bee/9.png", "ant/1.png", "ant"),
        ("bee/9.png", "bee/2.png", "bee"),
    }
    assert sum(row["images"] for row in report.tables["sizes"]) == 11
    told = "\n".join(report.lines)
    assert "unreadable: 1, the first is val/ant/8.png" in told
    assert "copies of training images in validation, which make accuracy too good: 1, the first is bee/9.png" in told
    assert "copies with another label: 1, the first is bee/9.png, the same as ant/1.png" in told


def test_nothing_wrong_and_uneven_classes_are_said():
    assert check_data(ImageData(Fake(3, size=4, train_images=9), 3, 8, 2)).lines == [
        "nothing is wrong with these images"
    ]
    source = Fake(2, size=4, train_images=12)
    source.train.labels[:] = [0] * 10 + [1] * 2
    (line,) = check_data(ImageData(source, 2, 8, 2)).lines
    assert "largest class has 5 times the training images of the smallest; see task.class_weights=auto" in line


def test_a_set_without_training_images_is_checked(photos):
    shutil.rmtree(f"{photos.root}/train")
    report = check_data(ImageData(ImageFolder(photos.root, val_fraction=None), 2, 8, 2))
    assert report.figures["images_val"] == 4 and "images_train" not in report.figures


def test_batches_are_shown_with_their_labels():
    options = {"mixup": 0.8, "shift": 0.1}
    data = ImageData(Digits(), 10, 8, 64, mean=(0.5,) * 3, std=(0.5,) * 3, augment=options, eval={"squash": True})
    report = show_data(data, images=4)
    assert report.figures == {"images_train": 4, "images_val": 2}
    assert report.lines == ["shares of mixed labels are written below the images"]
    texts = [text.get_text() for axis in report.pictures["batches"].axes for text in axis.texts]
    assert len(texts) == 6 and any("%" in text for text in texts[:4]) and not any("%" in text for text in texts[4:])


def test_shown_pixels_are_those_of_the_file():
    data = ImageData(Fake(size=8), 10, 8, 4, eval={"squash": True})
    batch = next(iter(data.val_dataloader()))
    seen = visible(data._stage(batch, training=False).images, data.mean, data.std)
    assert np.allclose(seen[0], batch.images[0].permute(1, 2, 0).numpy() / 255, atol=1e-5)
    data = ImageData(Fake(size=8), 10, 8, 4, mean=[0.0] * 5, std=[1.0] * 5, channels=5, depth="float32")
    batch = next(iter(data.val_dataloader()))
    assert visible(data._stage(batch, training=False).images, data.mean, data.std)[0].shape == (8, 8, 3)


def test_labels_in_words():
    classes = ["cat", "dog", "a class with a very long name"]
    assert in_words(torch.tensor(1), classes) == "dog"
    assert in_words(torch.tensor([0.3, 0.7, 0.001]), classes) == "dog 70%\ncat 30%"
    assert in_words(torch.tensor([1.0, 0, 1]), classes).splitlines() == ["cat", "a class with a ve…"]
    assert in_words(torch.tensor([0.0, 0, 0]), classes) == "(none)"


@pytest.mark.full
@pytest.mark.parametrize("probe", ["check_data", "show_data"])
def test_they_need_no_checkpoint(photos, command, probe):
    status, out, err = command("eval", f"probe={probe}", "data=imagefolder", f"data.root={photos.root}")
    assert status == (0 if probe == "check_data" else 2), out + err  # an unreadable image is shown to nobody
