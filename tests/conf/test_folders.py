"""Counting classes needs nothing but the file system, and says what it found instead of class folders."""

import subprocess
import sys

import pytest

from conf.folders import TREE, class_folders, count_class_folders, image_files


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


def test_missing_root_names_what_lies_next_to_it(tmp_path):
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*/imagnet, got data.root=.* holds imagenet/\)") as error:
        count_class_folders(tmp_path / "imagnet")
    assert TREE in str(error.value)


def test_classes_without_splits(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match=r"no folder .*/train, got .* holds ant/, bee/\); images must lie as <root>"):
        count_class_folders(tmp_path)


def test_split_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no class folders in .*/train, got .*holds nothing"):
        count_class_folders(tmp_path)
    (tmp_path / "train" / "1.jpg").touch()
    with pytest.raises(ValueError, match=r"no class folders in .*/train, got .*holds 1.jpg"):
        count_class_folders(tmp_path)


def test_imports_nothing_heavy():
    code = "import sys, conf.folders; print(sorted({'torch', 'numpy', 'PIL', 'pytorch_lightning'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
