"""Counting classes needs nothing but the file system, and says what it found instead of class folders."""

import os
import subprocess
import sys

import pytest

from conf.folders import (
    EXTENSIONS,
    TREE,
    class_folders,
    count_class_folders,
    image_files,
    layout,
    printable,
    suffixes,
)


def test_counts_the_folders_of_train(image_tree):
    root = image_tree(("bee", "ant", "cow"))
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "notes.txt").touch()
    assert count_class_folders(root) == 3
    assert class_folders(str(root), "val") == ["ant", "bee", "cow"]


def test_images_are_found_at_any_depth(tmp_path):
    for name in ("b.JPG", "a.png", "deep/c.webp", "notes.txt", "._b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(image_files(tmp_path)) == ["a.png", "b.JPG", "deep/c.webp"]


@pytest.mark.parametrize("root", [None, ""])
def test_no_root(root):
    with pytest.raises(ValueError, match=r"data.root: no image folder, got .*; set data.root="):
        count_class_folders(root)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"root": ["a", "b"]}, r"data\.root: must be one text, got \['a', 'b'\]; set data\.root"),
        ({"root": "a", "classes": ["b", "c"]}, r"data\.classes: must be a file of class names, .*, got \['b', 'c'\]"),
    ],
)
def test_a_list_in_the_place_of_a_file(given, said):
    with pytest.raises(ValueError, match=said):
        count_class_folders(**given)


def test_missing_root_names_what_lies_next_to_it(tmp_path):
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*/imagnet, got data.root=.* holds imagenet/\)") as error:
        count_class_folders(tmp_path / "imagnet")
    assert TREE in str(error.value)


def test_classes_without_splits_and_images(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*/train, got .* holds ant/, bee/\); images must lie as <root>"):
        count_class_folders(tmp_path)


def images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_class_folders_alone_are_a_flat_folder(tmp_path):
    root = images(tmp_path, "ant/1.jpg", "bee/deep/2.png", "__MACOSX/ant/._1.jpg", "notes.txt")
    assert layout(root) == (root, None, True)
    assert count_class_folders(root) == 2


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (("train/ant/1.jpg", "val/ant/2.jpg", "test/ant/3.jpg"), "train", "val"),
        (("Train/ant/1.jpg", "Validation/ant/2.jpg"), "Train", "Validation"),
        (("training/ant/1.jpg", "test/ant/2.jpg"), "training", "test"),
        (("train/ant/1.jpg", "notes/1.txt"), "train", None),
        (("val/ant/1.jpg",), None, "val"),
    ],
)
def test_folders_of_splits_by_the_names_that_people_give_them(tmp_path, names, train, val):
    found = layout(images(tmp_path, *names))
    assert [path and path.name for path in found[:2]] == [train, val] and not found.flat


def test_a_class_may_be_called_train(tmp_path):
    found = layout(images(tmp_path, "train/1.jpg", "bus/2.jpg", "car/3.jpg"))
    assert found.flat and count_class_folders(tmp_path) == 3


def test_a_root_one_level_too_high_is_named(tmp_path):
    images(tmp_path, "birds/train/ant/1.jpg", "birds/val/ant/1.jpg")
    with pytest.raises(ValueError, match=r"birds holds train/ or val/, so it is a root .*; set data.root=.*/birds"):
        layout(tmp_path)


def test_links_that_lead_back_are_not_followed(tmp_path):
    root = images(tmp_path, "train/ant/1.jpg", "train/ant/deep/2.jpg", "train/bee/3.jpg")
    for link, target in (("ant/again", "."), ("ant/up", ".."), ("ant/top", "../.."), ("ant/same", "deep")):
        (root / "train" / link).symlink_to(target)
    (root / "train" / "round").symlink_to(".")
    assert sorted(image_files(root / "train" / "ant")) == ["1.jpg", "deep/2.jpg"]
    assert class_folders(root, "train") == ["ant", "bee"]


def test_a_link_to_images_elsewhere_is_followed(tmp_path):
    images(tmp_path, "store/1.jpg")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "train" / "ant" / "more").symlink_to(tmp_path / "store")
    (tmp_path / "train" / "bee").symlink_to(tmp_path / "store")
    assert list(image_files(tmp_path / "train" / "ant")) == ["more/1.jpg"]
    assert list(image_files(tmp_path / "train" / "bee")) == ["1.jpg"]


def test_what_is_no_image_by_its_suffix_is_counted(tmp_path):
    root = images(tmp_path, "a.jpg", "b.JFIF", "c.gif", "d.avif", "e.jpe", "f.heic", "g.HEIC", "h.txt", "i", ".j.jpg")
    left_out = []
    assert list(image_files(root, left_out)) == ["a.jpg", "b.JFIF", "c.gif", "d.avif", "e.jpe"]
    assert suffixes(left_out) == "2 .heic, 1 .txt, 1 without a suffix"


def test_every_suffix_is_one_that_pillow_or_numpy_reads():
    from PIL import Image, features

    Image.init()
    missing = {".npy"} | ({".avif", ".avifs"} if not features.check("avif") else set())
    assert {Image.registered_extensions().get(suffix) in Image.OPEN for suffix in set(EXTENSIONS) - missing} == {True}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    images(tmp_path, "ant/1.jpg")

    def refused(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(ValueError, match=r"a folder cannot be read, got .*/ant \(Permission denied\); give it"):
        list(image_files(tmp_path / "ant"))


def test_paths_are_printed_on_one_line():
    assert printable("a\nb\tc ž") == r"a\nb\tc ž"
    assert printable(b"\xff.jpg".decode("utf-8", "surrogateescape")) == r"\xff.jpg"


def test_a_class_name_that_is_no_text_is_refused(tmp_path):
    images(tmp_path, "train/ant/1.jpg")
    os.mkdir(os.fsencode(tmp_path) + b"/train/\xff")
    with pytest.raises(ValueError, match=r"must have a name in UTF-8, got \\xff in .*/train; rename it"):
        class_folders(tmp_path, "train")


def test_split_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no class folders in .*/train, got .*holds nothing"):
        count_class_folders(tmp_path)
    (tmp_path / "train" / "1.jpg").touch()
    with pytest.raises(ValueError, match=r"no class folders in .*/train, got .*holds 1.jpg"):
        count_class_folders(tmp_path)


def test_imports_nothing_heavy():
    heavy = {"torch", "numpy", "PIL", "pytorch_lightning"}
    code = f"import sys, conf.folders, conf.lists; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
