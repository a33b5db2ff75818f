"""Folders of images that nobody split: what is held out, what is said, and that a run keeps it."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from data.module import ImageData
from data.sources.decode import UnreadableImage, read_image
from data.sources.imagefolder import ImageFolder
from data.sources.split_file import leave_split, take_split


@pytest.fixture
def photos(tmp_path):
    """A function that writes `photos/<class>/<i>.png`, so many of each class, and returns the folder."""

    def make(below="", **counts):
        for label, (name, count) in enumerate(counts.items()):
            (folder := tmp_path / "photos" / below / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (60 * label, number, 0)).save(folder / f"{number}.png")
        return tmp_path / "photos"

    return make


def files(split):
    return [split.relative_path(index) for index in range(len(split))]


def test_a_flat_folder_is_split(photos):
    source = ImageFolder(photos(ant=20, bee=10))
    assert source.classes == ["ant", "bee"]
    assert np.bincount(source.val.labels).tolist() == [4, 2] and np.bincount(source.train.labels).tolist() == [16, 8]
    assert not set(files(source.train)) & set(files(source.val))
    image, label = source.val[5]
    assert image.getpixel((0, 0))[0] == 60 and label == 1
    assert source.notes() == [
        "no train/ and val/: 24 images for training, 6 for validation, 20 % of each class by seed 0 (split.csv)"
    ]
    assert files(ImageFolder(photos(), seed=1).val) != files(source.val)
    assert len(ImageFolder(photos(), val_fraction=0.5).val) == 15


def test_train_alone_is_split_too(photos):
    root = photos("train", ant=10, bee=10)
    source = ImageFolder(root)
    assert (len(source.train), len(source.val)) == (16, 4)
    assert source.train.relative_path(0).startswith("ant/")  # as label maps expect
    assert source.notes()[0].startswith("no val/: 16 images for training, 4 for validation, 20 % of each class")
    assert source.kept_split()[0][0].startswith("train/ant/")


def test_all_images_can_be_evaluated(photos):
    source = ImageFolder(photos(ant=3, bee=1), val_fraction=1)
    assert len(source.val) == 4
    assert source.notes()[0].startswith("no train/ and val/: 0 images for training, 4 for validation, 100 % of each")
    data = ImageData(source, num_classes=2, image_size=8, batch_size=2)
    data.check(training=False)
    with pytest.raises(ValueError, match="the train split has no images"):
        data.check()


def test_a_class_of_one_image_is_named(photos):
    source = ImageFolder(photos(ant=10, bee=1))
    assert np.bincount(source.val.labels, minlength=2).tolist() == [2, 0]
    assert source.notes()[0].endswith("(split.csv); bee: one image, for training alone")


@pytest.mark.parametrize("value", [0, 1.2, "a fifth"])
def test_no_share(photos, value):
    data = ImageData(ImageFolder(photos(ant=2), val_fraction=value), num_classes=1, image_size=8, batch_size=1)
    with pytest.raises(ValueError, match=r"data.val_fraction: must be a share above 0 .*; set data.val_fraction=0.2"):
        data.check()


def test_a_share_of_a_folder_that_has_validation(image_tree):
    source = ImageFolder(image_tree(), val_fraction=0.1)
    with pytest.raises(ValueError, match=r"data.val_fraction: .*/val is the validation set, got 0.1; leave"):
        source.train  # noqa: B018


def test_folders_that_are_split_say_nothing(image_tree):
    source = ImageFolder(image_tree())
    assert source.notes() == [] and source.kept_split() == []


def test_another_name_of_validation_and_files_left_out_are_said(photos):
    photos("train", ant=2, bee=2)
    root = photos("valid", ant=1, bee=1)
    (root / "train" / "ant" / "3.heic").touch()
    (root / "valid" / "ant" / "read me.txt").touch()
    source = ImageFolder(root)
    assert (len(source.train), len(source.val)) == (4, 2)
    assert source.notes() == [
        "2 files are left out, by their suffix they are no image: 1 .heic, 1 .txt",
        "valid/ is the validation set",
    ]


def test_a_run_keeps_its_split_although_files_are_added(photos, tmp_path):
    root, run = photos(ant=10, bee=10), tmp_path / "run"
    run.mkdir()
    first = ImageFolder(root)
    leave_split(first, run)
    rows = list(csv.DictReader((run / "split.csv").open()))
    assert list(rows[0]) == ["file", "class", "label", "split"]
    assert [row["split"] for row in rows].count("val") == 4
    assert {(row["class"], row["label"]) for row in rows} == {("ant", "0"), ("bee", "1")}

    photos(ant=15)
    assert len(ImageFolder(root).train) == 20
    again = ImageFolder(root)
    take_split(again, run)
    assert files(again.train) == files(first.train) and files(again.val) == files(first.val)
    assert np.array_equal(again.train.labels, first.train.labels)
    assert again.notes()[0].endswith(
        "split.csv: 16 images for training, 4 for validation; 5 images that it lacks are left out"
    )
    moved = shutil.move(root, tmp_path / "elsewhere")
    assert ImageFolder(moved, split=run / "split.csv").val.path(0).startswith(f"{moved}/ant/")


def test_a_split_with_files_that_are_gone(photos, tmp_path):
    root = photos(ant=4, bee=4)
    leave_split(ImageFolder(root), tmp_path)
    (root / "bee" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"data.split: 1 files of .*split.csv are not below .*photos, got bee/0.png; "):
        ImageFolder(root, split=tmp_path / "split.csv").train  # noqa: B018


def test_a_split_that_is_none(photos, tmp_path):
    (tmp_path / "a.csv").write_text("file,class\nant/0.png,ant\n")
    with pytest.raises(ValueError, match=r"data.split: must have a column split of train and val, got .*a.csv without"):
        ImageFolder(photos(ant=2), split=tmp_path / "a.csv").train  # noqa: B018


def test_names_that_no_terminal_likes_survive_the_file(photos, tmp_path):
    root = photos(ant=2)
    for name in (b"new\nline.png", b"\xff.png", 'co,mma"ž.png'.encode()):
        with open(str(root / "ant").encode() + b"/" + name, "wb") as file:
            Image.new("RGB", (4, 4)).save(file, "PNG")
    first = ImageFolder(root, val_fraction=0.4)
    leave_split(first, tmp_path)
    again = ImageFolder(root, split=tmp_path / "split.csv")
    assert files(again.train) + files(again.val) == files(first.train) + files(first.val)
    assert sorted(image.size for image, _ in (*again.train, *again.val)) == [(4, 4)] * 3 + [(32, 32)] * 2


def test_named_classes_are_in_their_order_and_may_be_some(photos, tmp_path):
    root = photos(ant=5, bee=5, cow=5)
    (tmp_path / "classes.txt").write_text("cow\nant\n")
    source = ImageFolder(root, classes=tmp_path / "classes.txt")
    assert source.classes == ["cow", "ant"]
    assert {
        (name.partition("/")[0], label) for name, label in zip(files(source.train), source.train.labels, strict=True)
    } == {
        ("cow", 0),
        ("ant", 1),
    }
    (tmp_path / "classes.txt").write_text("cow\ndog\n")
    with pytest.raises(ValueError, match=r"data.classes: 1 of 2 classes have no folder in .*photos, got dog; give"):
        ImageFolder(root, classes=tmp_path / "classes.txt").classes  # noqa: B018


def test_a_strip_is_refused_before_it_fills_the_memory(tmp_path):
    Image.new("RGB", (1, 300)).save(tmp_path / "strip.png")
    Image.new("RGB", (2, 512)).save(tmp_path / "thin.png")
    assert read_image(tmp_path / "thin.png").size == (2, 512)
    with pytest.raises(UnreadableImage, match=r"got .*strip.png \(ValueError: 1 × 300 pixels, one side more than 256"):
        read_image(tmp_path / "strip.png")


def test_a_run_splits_keeps_and_evaluates_the_same_images(command, photos, tmp_path):
    root = photos(ant=10, bee=10)
    settings = (
        "model=vit_32px",
        "data=imagefolder",
        f"data.root={root}",
        "logger=none",
        "run.name=a",
        "data.workers=0",
    )
    small = (*settings, "data.batch_size=8", "augment=none", "~callbacks.ema")
    status, said, _ = command("train", *small, "trainer.max_epochs=1")
    assert status == 0 and "no train/ and val/: 16 images for training, 4 for validation" in said
    before = (tmp_path / "outputs" / "a" / "split.csv").read_bytes()
    photos(ant=14)
    status, said, _ = command("train", *small, "trainer.max_epochs=2")
    assert status == 0 and "step 4/4" in said and "4 images that it lacks are left out" in said
    assert (tmp_path / "outputs" / "a" / "split.csv").read_bytes() == before
    status, said, wrong = command("eval", "ckpt=outputs/a/checkpoints/last", "data.workers=0")
    assert status == 0, wrong
