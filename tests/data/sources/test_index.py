"""The index of a folder of images: the same images, without a walk, as long as the tree is as it was."""

import os
import time

import numpy as np
import pytest

from conf.errors import UserError
from data.sources import index
from data.sources.imagefolder import ImageFolder


@pytest.fixture
def tree(tmp_path):
    """Two classes, one with folders in it, all older than what is not trusted."""
    root = tmp_path / "images"
    for name in ("ant/1.png", "ant/2.png", "bee/deep/3.png", "bee/4.txt"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).touch()
    age(root)
    return root


def age(root):
    past = time.time() - 3600
    for place, _, _ in os.walk(root):
        os.utime(place, (past, past))


def listed(tree, where):
    return index.listed(str(tree / "train"), ["ant", "bee"], where)


@pytest.fixture
def walks(monkeypatch):
    """How often the tree is walked."""
    found, walked = [], index.walked
    monkeypatch.setattr(index, "walked", lambda *given: found.append(given[0]) or walked(*given))
    return found


def same(one, other):
    assert one.files.tolist() == other.files.tolist() and one.labels.tolist() == other.labels.tolist()
    assert one.left_out == other.left_out


def test_the_second_start_does_not_walk(tree, tmp_path, walks):
    first, second = listed(tree, tmp_path / "indices"), listed(tree, tmp_path / "indices")
    assert len(walks) == 1
    same(first, second)
    assert first.files.tolist() == [b"ant/1.png", b"ant/2.png", b"bee/deep/3.png"] and first.left_out == ["4.txt"]
    assert isinstance(second.files, np.memmap) and not second.files.flags.writeable


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "below"])
def test_a_tree_that_was_changed_is_walked_again(tree, tmp_path, walks, change):
    listed(tree, tmp_path / "indices")
    folder = tree / "train"
    if change == "added":
        (folder / "ant/5.png").touch()
    elif change == "removed":
        (folder / "ant/1.png").unlink()
    elif change == "renamed":
        (folder / "ant/1.png").rename(folder / "ant/9.png")
    else:
        (folder / "bee/deep/6.png").touch()
    found = listed(tree, tmp_path / "indices")
    assert len(walks) == 2
    same(found, index.walked(str(folder), ["ant", "bee"])[0])


def test_a_tree_that_was_just_written_has_no_index_yet(tree, tmp_path, walks):
    (tree / "train/ant/5.png").touch()
    listed(tree, tmp_path / "indices")
    listed(tree, tmp_path / "indices")
    assert len(walks) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b'{"folders": 3}', b'{"images": 9, "folders": {}, "left_out": []}'])
def test_a_broken_index_is_made_anew(tree, tmp_path, walks, content):
    first = listed(tree, tmp_path / "indices")
    (place,) = (tmp_path / "indices").glob("index-*")
    (place / "index.json").write_bytes(content)
    same(listed(tree, tmp_path / "indices"), first)
    assert len(walks) == 2
    same(listed(tree, tmp_path / "indices"), first)
    assert len(walks) == 2


def test_other_classes_have_another_index(tree, tmp_path):
    listed(tree, tmp_path / "indices")
    assert index.listed(str(tree / "train"), ["bee"], tmp_path / "indices").labels.tolist() == [0]


def test_a_small_tree_leaves_nothing_in_the_cache_and_a_large_one_does(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    listed(tree, "auto")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(index, "FEW", 3)
    listed(tree, "auto")
    assert len(list((tmp_path / "cache/vision-attention-zoo").iterdir())) == 1


def test_a_disk_that_takes_no_index_is_no_matter(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert len(listed(tree, tmp_path / "indices").files) == 3
    assert not list((tmp_path / "indices").iterdir())


def test_a_folder_that_cannot_be_made_is_named(tree, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.source.index: the folder cannot be made, got .*file/x .*; give another"):
        listed(tree, tmp_path / "file" / "x")


def test_a_source_trains_on_the_same_images_with_an_index(tree, tmp_path):
    for _ in range(2):
        source = ImageFolder(tree, index=tmp_path / "indices")
        assert [source.train.relative_path(i) for i in range(2)] == ["ant/2.png", "bee/deep/3.png"]
        assert source.train.labels.tolist() == [0, 1] and source.val.relative_path(0) == "ant/1.png"
