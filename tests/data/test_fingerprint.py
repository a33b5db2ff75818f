"""A data set is known again wherever it lies, and what has changed in it is named."""

import os
import shutil

import numpy as np
import pytest

from data.changes import NAME, changes, check_same, keep_names, read_names
from data.module import ImageData
from data.order.fingerprint import LOOKED_AT, LOOKED_INTO, fingerprint, heads_on_disk, looked_at, names_hashed
from data.sources.array_split import ArraySplit
from data.sources.fake import Fake
from data.sources.imagefolder import FolderSplit, ImageFolder
from data.sources.imagelist import ImageList
from data.sources.part import Part


@pytest.fixture
def root(tmp_path):
    """Three classes, the same file names in each, of sizes that differ."""
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                (folder / f"{image}.png").write_bytes(b"x" * (10 + 5 * number + image))
    return tmp_path / "set"


def seen(root):
    source = ImageFolder(root)
    return fingerprint(source.classes, train=source.train, val=source.val), {"train": source.train, "val": source.val}


def told(root, change, tmp_path):
    """What is said after a change."""
    before, splits = seen(root)
    keep_names(tmp_path / NAME, **splits)
    change()
    after, splits = seen(root)
    names = changes(before, after, read_names(tmp_path / NAME, **splits))
    return changes(before, after), names


@pytest.mark.case(24)
def test_a_data_set_that_has_moved_is_the_same(root, tmp_path):
    shutil.copytree(root, tmp_path / "elsewhere" / "set")
    assert changes(seen(root)[0], seen(tmp_path / "elsewhere" / "set")[0]) == []
    check_same(seen(root)[0], seen(tmp_path / "elsewhere" / "set")[0])


@pytest.mark.case(24)
@pytest.mark.parametrize(
    ("change", "known", "named"),
    [
        (lambda r: _renamed(r, "ant", "zebra"), "class 'ant' is called 'zebra'; label 0 was 'ant' and is 'bee'", None),
        (lambda r: _renamed(r, "cat", "dog"), "class 'cat' is called 'dog'; label 2 was 'cat' and is 'dog'", None),
        (
            lambda r: (r / "train/ant/1.png").rename(r / "train/bee/9.png"),
            "train: class 'ant' has 3 images, had 4; train: class 'bee' has 5 images, had 4",
            "train: ant/1.png is gone; train: bee/9.png is new",
        ),
        (
            lambda r: (r / "val/cat/1.png").rename(r / "val/cat/one.png"),
            "val: class 'cat' has other files",
            "val: cat/1.png is gone; val: cat/one.png is new",
        ),
        (
            lambda r: (r / "train/cat/3.png").write_bytes(b"other"),
            "train: images have other sizes",
            "train: cat/3.png has 5 bytes, had 23",
        ),
        (
            lambda r: (r / "train/cat/3.png").write_bytes(b"y" * 23),
            "train: images hold something else",
            "train: cat/3.png holds something else",
        ),
        (
            lambda r: _swapped(r, "ant", "bee"),
            "train: images have other sizes; val: images have other sizes",
            "train: ant/0.png has 15 bytes, had 10; train: ant/1.png has 16 bytes, had 11; "
            "train: ant/2.png has 17 bytes, had 12; train: and 5 more; val: ant/0.png has 15 bytes, had 10; "
            "val: ant/1.png has 16 bytes, had 11; val: bee/0.png has 10 bytes, had 15; val: and 1 more",
        ),
    ],
    ids=["renamed", "same order", "moved", "other name", "replaced", "as large", "swapped"],
)
def test_what_has_changed_is_named(root, tmp_path, change, known, named):
    without, with_names = told(root, lambda: change(root), tmp_path)
    assert "; ".join(without) == known
    assert "; ".join(with_names) == (known if named is None else named)


def _renamed(root, old, new):
    for split in ("train", "val"):
        (root / split / old).rename(root / split / new)


def _swapped(root, one, other):
    _renamed(root, one, "x")
    _renamed(root, other, one)
    _renamed(root, "x", other)


def test_a_file_that_lies_in_another_class_now(root, tmp_path):
    (root / "train/ant/only.png").write_bytes(b"1234")
    without, with_names = told(
        root, lambda: (root / "train/ant/only.png").rename(root / "train/cat/only.png"), tmp_path
    )
    assert with_names == ["train: ant/only.png is cat/only.png now"] and len(without) == 2


@pytest.mark.case(24)
def test_a_run_does_not_go_on_with_other_data(root):
    def data():
        return ImageData(ImageFolder(root), 3, 8, 4)

    state = data().state_dict()
    data().load_state_dict(state)
    older = {name: value for name, value in state.items() if name != "data"}
    _renamed(root, "ant", "zebra")
    data().load_state_dict(older)
    with pytest.raises(ValueError, match=r"resume: the data is not that of .*: class 'ant' is called 'zebra'"):
        data().load_state_dict(state)


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert heads_on_disk([str(tmp_path / "pipe.png"), str(tmp_path / "none.png"), str(tmp_path)]) == [-1, -1, -1]


def test_an_older_fingerprint_that_knows_less_is_no_other(root):
    before, _ = seen(root)
    del before["train"]["contents"], before["val"]["contents"]
    (root / "train/cat/3.png").write_bytes(b"y" * 23)
    assert changes(before, seen(root)[0]) == []


def test_lists_arrays_and_parts(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / "b.png").write_bytes(b"22")
    for name, rows in (("one", "a.png,x\nb.png,y\n"), ("two", "b.png,y\na.png,x\n"), ("three", "a.png,y\nb.png,x\n")):
        (tmp_path / f"{name}.csv").write_text(f"file,label\n{rows}")
    lists = [ImageList(tmp_path / f"{name}.csv", tmp_path / "one.csv") for name in ("one", "two", "three")]
    first, *others = [fingerprint(found.classes, train=found.train) for found in lists]
    said = [changes(first, other) for other in others]
    assert said == [
        ["train: images come in another order"],
        ["train: class 'x' has other files", "train: class 'y' has other files"],
    ]
    several = ImageList(tmp_path / "one.csv", tmp_path / "one.csv", separator=";")
    assert fingerprint(several.classes, train=several.train)["train"]["counts"] == [1, 1]
    pixels, labels = np.arange(96, dtype=np.uint8).reshape(6, 4, 4), np.arange(6) % 2
    whole, other = ArraySplit(pixels, labels), ArraySplit(pixels[::-1], labels)
    first, second = (fingerprint(["a", "b"], train=split) for split in (whole, other))
    assert changes(first, second) == ["train: images hold something else"]
    few, more = (Part(Fake(), subset, 0) for subset in (2, 3))
    assert len(changes(*(fingerprint(part.classes, train=part.train) for part in (few, more)))) == 4


def test_names_are_hashed_whatever_the_longest_is():
    names = [b"ant/0.png", b"bee/0.png", b"0.png", b"ant/b/0.png"]
    whole, last = names_hashed(np.array(names, np.bytes_))
    assert len(set(whole.tolist())) == 4 and len(set(last.tolist())) == 1
    longer, _ = names_hashed(np.array([*names, b"x" * 99], np.bytes_))
    assert (longer[:4] == whole).all()


def test_a_million_images_take_a_second_and_a_few_sizes(monkeypatch, tmp_path):
    """Counted, not timed: of how many files the size is asked for."""
    asked, read = [], []
    split = FolderSplit.of(
        str(tmp_path), np.array([b"a/%d.png" % i for i in range(50_000)], np.bytes_), np.zeros(50_000, np.int64)
    )
    monkeypatch.setattr("data.sources.imagefolder.sizes_on_disk", lambda paths: asked.extend(paths) or [1] * len(paths))
    heads = "data.sources.imagefolder.heads_on_disk"
    monkeypatch.setattr(heads, lambda paths: read.extend(paths) or [1] * len(paths))
    fingerprint(["a"], train=split)
    assert len(read) == LOOKED_INTO
    assert len(asked) == LOOKED_AT and len(looked_at(50_000)) == LOOKED_AT and len(looked_at(7)) == 7
