"""Images by a list: what is where, which labels there are, and how they are split."""

import numpy as np
import pytest
from PIL import Image

from data.sources.imagelist import ImageList
from data.sources.split_file import leave_split, take_split


@pytest.fixture
def listed(tmp_path):
    """A function that writes `images/<i>.png` of level i and a list of them, and returns the list."""

    def write(labels, name="all.csv", header="file,label", suffix=".png"):
        (tmp_path / "images").mkdir(exist_ok=True)
        for number in range(len(labels)):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        rows = [f"images/{number}{suffix},{label}" for number, label in enumerate(labels)]
        (tmp_path / name).write_text("\n".join([header, *rows]))
        return tmp_path / name

    return write


def test_two_lists(listed):
    source = ImageList(listed(["b", "a", "b"]), listed(["a", "b"], "val.csv"))
    assert source.classes == ["a", "b"]
    assert source.train.labels.tolist() == [1, 0, 1] and source.val.labels.tolist() == [0, 1]
    image, label = source.train[2]
    assert image.getpixel((0, 0)) == (2, 0, 0) and label == 1
    assert source.notes() == [] and source.kept_split() == []


def test_labels_need_not_start_at_zero(listed):
    source = ImageList(listed([5, 7, 5, 11] * 5))
    assert source.classes == ["5", "7", "11"]
    assert set(source.train.labels) == {0, 1, 2}


def test_numbers_are_positions_in_the_names(listed, tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    source = ImageList(listed([2, 0, 2]), listed([1], "val.csv"), classes=tmp_path / "names.txt")
    assert source.classes == ["ant", "bee", "cow"] and source.train.labels.tolist() == [2, 0, 2]
    source = ImageList(listed([2, 3]), listed([1], "val.csv"), classes=tmp_path / "names.txt")
    with pytest.raises(
        ValueError, match=r"data.source.train: 1 labels are no class, got '3', the 3 classes are ant, bee"
    ):
        source.train  # noqa: B018


def test_one_list_is_split_and_the_run_keeps_it(listed, tmp_path):
    source = ImageList(listed(["a", "b"] * 10))
    assert (len(source.train), len(source.val)) == (16, 4) and np.bincount(source.val.labels).tolist() == [2, 2]
    assert source.notes() == [
        "one list: 16 images for training, 4 for validation, 20 % of each class by seed 0 (split.csv)"
    ]
    leave_split(source, tmp_path)
    again = ImageList(listed(["a", "b"] * 15), root=tmp_path)
    take_split(again, tmp_path)
    assert again.val.files.tolist() == source.val.files.tolist() and len(again.train) == 16
    assert again.classes == source.classes


def test_a_column_of_splits(listed, tmp_path):
    path = listed(["a,train", "b,train", "a,test", "b,val"], header="file,label,split")
    source = ImageList(path)
    assert (len(source.train), len(source.val)) == (2, 1) and source.val.labels.tolist() == [1]
    assert source.notes() == []


def test_several_labels(listed, tmp_path):
    source = ImageList(listed(["a;b", "c", "", "b"] * 5), separator=";")
    assert source.classes == ["a", "b", "c"]
    assert source.train.labels.dtype == bool and source.train.labels.shape[1] == 3
    row = next(i for i in range(len(source.train)) if source.train[i][0].getpixel((0, 0))[0] % 4 == 0)
    assert source.train[row][1].tolist() == [True, True, False]
    leave_split(source, tmp_path)
    again = ImageList(None, root=tmp_path, separator=";", split=tmp_path / "split.csv")
    assert np.array_equal(again.train.labels, source.train.labels)


def test_names_without_their_suffix(listed):
    source = ImageList(listed(["a"] * 5, suffix=""))
    assert source.train.path(0).endswith(".png") and source.train[0][0].size == (4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "/nowhere"}, r"data.source: 4 of 4 files of .*all.csv .* are not below /nowhere, got images/0.png, "),
        ({"val": "v.csv", "val_fraction": 0.1}, r"data.val_fraction: data.source.val is the list of validation images"),
        ({"val_fraction": 2}, "data.val_fraction: must be a share above 0"),
        ({"train": None}, "data.source.train: no list of images, got None; set data.source.train="),
    ],
)
def test_what_is_wrong(listed, settings, message):
    with pytest.raises(ValueError, match=message):
        ImageList(**{"train": listed(["a", "b"] * 2), **settings}).train  # noqa: B018


def test_an_empty_label_and_a_file_that_is_no_list(listed):
    with pytest.raises(ValueError, match=r"data.source.train: image 2 of the list has no label; give it one or remove"):
        ImageList(listed(["a", "", "b"])).train  # noqa: B018
    with pytest.raises(ValueError, match=r"data.source.train: its column split must have train, got fit; mend"):
        ImageList(listed(["a,fit"], header="file,label,split")).train  # noqa: B018
