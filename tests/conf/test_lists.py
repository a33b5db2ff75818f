"""Lists of files and labels, in the forms that people have."""

import json

import pytest

from conf.folders import count_class_folders
from conf.lists import count_listed, imagenet_classes, read_classes, read_list


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


FORMS = {
    "a.csv": "file,label\na/1.jpg,cat\nb/2.jpg,ant\n",
    "excel.csv": "\ufefffile;label\r\na/1.jpg;cat\r\nb/2.jpg;ant\r\n",
    "kaggle.csv": "id,breed,label\na/1.jpg,x,cat\nb/2.jpg,y,ant\n",
    "plain.csv": "a/1.jpg,cat\nb/2.jpg,ant\n",
    "a.tsv": "filename\tclass\na/1.jpg\tcat\nb/2.jpg\tant\n",
    "a.txt": "a/1.jpg cat\nb/2.jpg ant\n",
    "objects.json": [{"file": "a/1.jpg", "label": "cat"}, {"file": "b/2.jpg", "label": "ant"}],
    "pairs.json": [["a/1.jpg", "cat"], ["b/2.jpg", "ant"]],
    "one.json": {"a/1.jpg": "cat", "b/2.jpg": "ant"},
    "classes.json": {"cat": ["a/1.jpg"], "ant": ["b/2.jpg"]},
    "coco.json": {
        "images": [{"id": 7, "file_name": "a/1.jpg"}, {"id": 9, "file_name": "b/2.jpg"}],
        "annotations": [{"image_id": 7, "category_id": 3}, {"image_id": 9, "category_id": 1}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "ant"}],
    },
    "a.jsonl": '{"file": "a/1.jpg", "label": "cat"}\n{"file": "b/2.jpg", "label": "ant"}\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(written, name):
    listed = read_list(written(name, FORMS[name]))
    assert listed.files == ["a/1.jpg", "b/2.jpg"] and listed.labels == ["cat", "ant"]
    assert listed.splits is None and listed.classes == ["ant", "cat"]


def test_columns_that_are_named(written):
    path = written("a.csv", "photo,species,file\n1.jpg,cat,x\n")
    assert read_list(path, file="photo", label="species")[:2] == (["1.jpg"], ["cat"])
    with pytest.raises(
        ValueError, match=r"the label column is not clear, got None in .*a.csv with photo, species, file"
    ):
        read_list(path)
    with pytest.raises(ValueError, match=r"the file column is not clear, got picture in .*; set data.source.file to"):
        read_list(path, file="picture", label="species")


def test_classes_are_in_the_order_of_their_numbers(written):
    assert read_list(written("a.csv", "file,class,label\n1,zebra,0\n2,ant,1\n")).classes == ["zebra", "ant"]
    assert read_list(written("b.csv", "file,label\n1,10\n2,9\n3,10\n")).classes == ["9", "10"]


def test_a_column_of_splits(written):
    assert read_list(written("a.csv", "file,label,Split\n1,a,Train\n2,a,val\n")).splits == ["train", "val"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "no rows"),
        ("a.csv", "file,label\n1.jpg,a\n2.jpg\n", "row 3 without a label"),
        ("a.json", "{", "no list that can be read"),
        ("a.json", "[1, 2]", "neither objects nor pairs"),
        ("a.json", '[{"file": 1, "label": 2}, {"file": 1}]', "an object with other keys than the first"),
    ],
)
def test_what_is_no_list(written, name, content, message):
    with pytest.raises(
        ValueError, match=f"list: must be a list of files and labels, got {message}.* in .*{name}; mend"
    ):
        read_list(written(name, content))


def test_no_list(tmp_path):
    with pytest.raises(ValueError, match=r"list: there is no file, got .*x.csv; give a CSV or JSON list"):
        read_list(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"data.source.train: no list of images, got None; set data.source.train="):
        count_class_folders(None, None, None, None)


def test_several_labels_are_counted_once(written):
    path = written("a.csv", "file,label\n1,b;a\n2,c\n3,b\n")
    assert count_class_folders(None, None, None, path, None, None, ";") == 3
    assert count_class_folders("/unused", None, None, path) == 3


def test_class_names(written):
    assert read_classes(written("a.txt", "cat\nant\n\n")) == ["cat", "ant"]
    assert read_classes(written("a.json", ["cat", "ant"])) == ["cat", "ant"]
    assert read_classes(written("b.json", {"1": "ant", "0": "cat"})) == ["cat", "ant"]
    assert read_classes(written("c.json", {"ant": 1, "cat": 0})) == ["cat", "ant"]
    with pytest.raises(ValueError, match=r"data.classes: must name every class once, got 'cat' twice in .*b.txt; mend"):
        read_classes(written("b.txt", "cat\nant\ncat\n"))
    with pytest.raises(ValueError, match=r"data.classes: there is no file, got none.txt; give a text file of class"):
        read_classes("none.txt")


def test_imagenet_has_its_order():
    names = imagenet_classes()
    assert len(names) == 1000 and names == sorted(names) and names[:2] == ["n01440764", "n01443537"]
    assert count_listed("imagenet") == 1000
