"""What is evaluated: classes keep the meaning that they had in training."""

import pickle

import numpy as np
import pytest
from PIL import Image

from conf.errors import UserError
from data.module import ImageData
from models.runs.finished import as_in_training


class Named:
    """One image of each class, whose grey says which."""

    embedded = True

    def __init__(self, *classes: str) -> None:
        self.classes = list(classes)
        self.labels = np.arange(len(classes))

    @property
    def val(self) -> "Named":
        return self

    train = val

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (ord(self.classes[index][0]),) * 3), index

    def relative_path(self, index: int) -> str:
        return f"{self.classes[index]}/0.png"


def data_of(*classes: str) -> ImageData:
    return ImageData(Named(*classes), len(classes), 8, 4, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(
    ("here", "labels"), [(("ant", "cat"), [0, 2]), (("cat", "bee", "ant"), [2, 1, 0]), (("bee",), [1])]
)
def test_classes_are_found_by_name(here, labels):
    data = data_of(*here)
    as_in_training(data, ["ant", "bee", "cat"], 3)
    assert data.num_classes == 3 and data.class_names == ["ant", "bee", "cat"]
    data.check(training=False)
    batch = next(iter(data.val_dataloader()))
    assert batch.labels.tolist() == labels and batch.images[:, 0, 0, 0].tolist() == [ord(name[0]) for name in here]
    split = pickle.loads(pickle.dumps(data.source.val))  # as workers get it
    assert split[0][1] == labels[0] and split.relative_path(0) == f"{here[0]}/0.png"


def test_nothing_is_touched_where_the_classes_are_the_same():
    for trained in (None, ["ant", "bee"]):
        data = data_of("ant", "bee")
        source = data.source
        as_in_training(data, trained, 2)
        assert data.source is source


@pytest.mark.case(26)
def test_classes_that_training_had_not_are_refused():
    with pytest.raises(
        UserError, match=r"label 1 was 'bee' and is 'emu' here; .* the same names \(training had no 'emu'\)"
    ):
        as_in_training(data_of("ant", "emu"), ["ant", "bee"], 2)
    with pytest.raises(UserError, match=r"the checkpoint has 3 classes, the data has 2; .*\(training had no 'emu'\)"):
        as_in_training(data_of("ant", "emu"), ["ant", "bee", "cat"], 3)
    with pytest.raises(UserError, match="the checkpoint has 3 classes, the data has 2"):
        as_in_training(data_of("ant", "bee"), None, 3)
