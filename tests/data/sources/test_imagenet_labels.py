"""ImageNet's validation images in one folder, with each of the lists that go round."""

import numpy as np
import pytest
from PIL import Image

from conf.lists import imagenet_classes
from data.sources.imagenet1k import ImageNet1k

NAMES = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 5)]
LABELS = [65, 970, 0, 999]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "val").mkdir()
    for name in NAMES:
        Image.new("RGB", (4, 4)).save(tmp_path / "val" / f"{name}.JPEG", "JPEG")
    return tmp_path


def ids():
    return [imagenet_classes()[label] for label in LABELS]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "LOC_val_solution.csv",
            ["ImageId,PredictionString", *map("{},{} 1 2 3 4".format, reversed(NAMES), reversed(ids()))],
        ),
        ("synset_labels.txt", ids()),
        ("val.txt", [f"{name}.JPEG {label}" for name, label in zip(NAMES, LABELS, strict=True)]),
        ("val_labels.txt", [str(label) for label in LABELS]),
    ],
)
def test_forms_of_the_list(root, name, lines):
    (root / name).write_text("\n".join(lines))
    source = ImageNet1k(root)
    assert source.val.labels.tolist() == LABELS and len(source.classes) == 1000
    assert source.val.path(0).endswith(f"val/{NAMES[0]}.JPEG") and source.val[1][1] == 970


def test_the_numbers_of_the_development_kit_need_its_table(root):
    from scipy.io import savemat

    (root / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n361\n171\n822\n")
    with pytest.raises(
        ValueError, match=r"got numbers of the development kit, which mean nothing without its meta.mat"
    ):
        ImageNet1k(root).val  # noqa: B018
    table = np.zeros(4, [("ILSVRC2012_ID", int), ("WNID", object)])
    table["ILSVRC2012_ID"], table["WNID"] = [490, 361, 171, 822], ids()
    savemat(root / "meta.mat", {"synsets": table})
    assert ImageNet1k(root).val.labels.tolist() == LABELS


def test_beside_training_folders(root):
    for name in imagenet_classes():
        (root / "train" / name).mkdir(parents=True)
    (root / "synset_labels.txt").write_text("\n".join(ids()))
    source = ImageNet1k(root)
    assert source.classes == imagenet_classes() and source.val.labels.tolist() == LABELS
    assert len(source.train) == 0 and source.notes() == [] and source.kept_split() == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            None,
            r"val has no class folders and there is no list of its labels, looked for LOC_val_solution.csv, .*; give",
        ),
        (["n01440764"], r"got 1 labels for 4 images in .*val.txt"),
        (["x 1", "y 2"], r"got no label of 4 images, the first is ILSVRC2012_val_00000001"),
        ([f"{name} cat" for name in NAMES], "got cat in"),
        (
            [f"{name} {label}" for name, label in zip(NAMES, (1, 2, 3, 1000), strict=True)],
            "got numbers of the development",
        ),
        ([], "got nothing in"),
    ],
)
def test_what_is_wrong_with_the_list(root, lines, message):
    if lines is not None:
        (root / "val.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        ImageNet1k(root).val  # noqa: B018
