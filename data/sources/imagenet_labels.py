"""The labels of ImageNet's validation images where they lie in one folder, from the lists that go round.

Forms: `LOC_val_solution.csv` of Kaggle; a WordNet id per line in the order of the files; `val.txt` of Caffe, file and
label from 0; the development kit's `ILSVRC2012_validation_ground_truth.txt`, whose numbers from 1 are in an order of
its own, so that `meta.mat` must lie near it.
"""

import os
from pathlib import Path

import numpy as np

from conf.errors import UserError
from conf.lists import imagenet_classes

NAMES = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_synset_labels.txt",
    "synset_labels.txt",
    "val.txt",
    "val_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)


def find_labels(root: Path) -> Path:
    """The list near a root whose `val` has no class folders.

    Raises:
        ValueError: there is none of a known name.
    """
    above = [root, root / "val", *Path(os.path.abspath(root)).parents[:3]]
    for folder in (*above, *(folder / "data" for folder in above), *(folder / "devkit" / "data" for folder in above)):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"ImageNet1k: {root / 'val'} has no class folders and there is no list of its labels, looked for "
        f"{', '.join(NAMES)}; give it as data.source.val_labels=..., or sort the images into class folders"
    )


def read_labels(path: Path, files: list[str]) -> np.ndarray:
    """The label of every file, int64 (len,), in the order of the sorted WordNet ids.

    Args:
        path: the list.
        files: names of the images, sorted.

    Raises:
        ValueError: the list is in none of the known forms, or not of these files.
    """
    rows = [line.replace(",", " ").split() for line in path.read_text().splitlines() if line.strip()]
    if rows and rows[0][0].lower() == "imageid":
        rows = rows[1:]
    if not rows:
        raise _wrong(path, "nothing")
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(files):
            raise _wrong(path, f"{len(rows)} labels for {len(files)} images")
        words = [row[0] for row in rows]
    else:
        label_of = {os.path.splitext(os.path.basename(row[0]))[0]: row[1] for row in rows if len(row) > 1}
        stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
        if lacking := [stem for stem in stems if stem not in label_of]:
            raise _wrong(path, f"no label of {len(lacking)} images, the first is {lacking[0]}")
        words = [label_of[stem] for stem in stems]
    return np.array(_numbers(path, words), np.int64)


def _numbers(path: Path, words: list[str]) -> list[int]:
    """Labels from WordNet ids, from numbers from 0, or from those of the development kit."""
    order = imagenet_classes()
    label_of = {name: label for label, name in enumerate(order)}
    if all(word in label_of for word in words):
        return [label_of[word] for word in words]
    if not all(word.isdecimal() for word in words):
        raise _wrong(path, next(word for word in words if word not in label_of and not word.isdecimal()))
    numbers = [int(word) for word in words]
    if "ground_truth" in path.name or max(numbers) >= len(order):
        by_number = _development_kit(path)
        numbers = [label_of[by_number[number]] if number in by_number else -1 for number in numbers]
    if min(numbers) < 0 or max(numbers) >= len(order):
        raise _wrong(path, "a number that no class has")
    return numbers


def _development_kit(path: Path) -> dict[int, str]:
    """WordNet id of each number of the kit, whose classes are not in the order of the ids."""
    from scipy.io import loadmat

    place = next(
        (folder / "meta.mat" for folder in (path.parent, *path.parents[:2]) if (folder / "meta.mat").is_file()), None
    )
    if place is None:
        raise _wrong(path, "numbers of the development kit, which mean nothing without its meta.mat beside them")
    synsets = loadmat(place, squeeze_me=True)["synsets"]
    return {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}


def _wrong(path: Path, what: str) -> UserError:
    return UserError(
        f"ImageNet1k: the list of validation labels must have a WordNet id per image, or file and label, got {what} in "
        f"{path}; give another as data.source.val_labels=..."
    )
