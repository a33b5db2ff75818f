"""Images that a list names, with their labels: CSV, TSV, JSON, JSON Lines or text (`conf.lists` says which forms).

The split is that of a second list, of a column `split` in the first, or a share of every class that is held out as
`data.sources.imagefolder` does. An image may have several labels, `cat;dog`, where a separator is given.
"""

import os
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.folders import EXTENSIONS, VAL, printable
from conf.lists import Listed, read_classes, read_list, several
from data.order.stratified import check_fraction, held_out
from data.sources.decode import read_image
from data.sources.imagefolder import HELD_OUT, SHOWN, FolderSplit
from data.sources.split_file import rows_of

CHECKED = 10_000  # files of a list that are looked for before a run, evenly spread over it


class LabelledSplit(FolderSplit):
    """Files of a list; `labels` are int64 (len,), or bool (len, classes) where an image may have several."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int | np.ndarray]:
        if self.labels.ndim == 1:
            return super().__getitem__(index)
        return read_image(self.path(index)), self.labels[index]


class ImageList:
    """Images by one or two lists; they are read when a split is first asked for.

    Args:
        train: the list of training images, or of all where there is no other.
        val: that of validation images; `None` for a column `split` of `train`, or to hold out a share.
        root: the folder that files are relative to; that of the list when `None`.
        file, label: columns; found by their names when `None`.
        separator: between the labels of one image, which then may have several.
        classes: a file of class names in the order of their labels, or `imagenet`; those that occur when `None`. Labels
            that are numbers are positions in it.
        val_fraction: the share of every class that is held out where no list says it; `None` for a fifth.
        split: a `split.csv` of a run, in place of the lists.
        seed: names what is held out.
    """

    embedded = False

    def __init__(
        self,
        train: str | os.PathLike | None,
        val: str | os.PathLike | None = None,
        root: str | os.PathLike | None = None,
        file: str | None = None,
        label: str | None = None,
        separator: str | None = None,
        classes: str | os.PathLike | None = None,
        val_fraction: float | None = None,
        split: str | os.PathLike | None = None,
        seed: int = 0,
    ) -> None:
        self.lists = {"train": train, "val": val}
        self.root = None if root is None else os.path.expanduser(root)
        self.columns, self.separator, self.named = (file, label), separator, classes
        self.val_fraction, self.split, self.seed = val_fraction, split, seed

    @cached_property
    def classes(self) -> list[str]:
        """Those that are named, or those of the training list, by number or by name."""
        if self.named is not None:
            return read_classes(self.named)
        listed = self._listed("train")
        return list(listed.classes) if self.separator is None else several(listed.labels, self.separator)

    @property
    def train(self) -> LabelledSplit:
        return self._splits[0]

    @property
    def val(self) -> LabelledSplit:
        return self._splits[1]

    def notes(self) -> list[str]:
        """How the images were split, where no list says it."""
        train, val = self._splits
        counts = f"{len(train)} images for training, {len(val)} for validation"
        if self.split is not None:
            return [f"{Path(self.split).name}: {counts}"]
        if not self._is_held_out:
            return []
        fraction = HELD_OUT if self.val_fraction is None else self.val_fraction
        return [f"one list: {counts}, {100 * fraction:.4g} % of each class by seed {self.seed} (split.csv)"]

    def kept_split(self) -> list[tuple[str, str, int | str, str]]:
        """The rows of `split.csv` where the images were split here; none where lists say it."""
        if not self._is_held_out:
            return []
        parts = zip(("train", "val"), self._splits, strict=True)
        if self.separator is None:
            return [row for name, part in parts for row in rows_of(part.files, part.labels, self.classes, name)]
        return [
            (os.fsdecode(file), self.separator.join(self.classes[i] for i in np.flatnonzero(row)), "", name)
            for name, part in parts
            for file, row in zip(part.files.tolist(), part.labels, strict=True)
        ]

    @cached_property
    def _splits(self) -> tuple[LabelledSplit, LabelledSplit]:
        if self.split is None and self.lists["val"] is not None:
            if self.val_fraction is not None:
                raise UserError(
                    f"data.val_fraction: data.source.val is the list of validation images, got {self.val_fraction}; "
                    "leave one of them out"
                )
            return self._read("train"), self._read("val")
        listed, whole = self._listed("train"), self._read("train")
        if listed.splits is not None:
            return whole.take(_is(listed.splits, ("train", "training"))), whole.take(_is(listed.splits, VAL))
        fraction = HELD_OUT if self.val_fraction is None else check_fraction(self.val_fraction, "data.val_fraction")
        first = whole.labels if whole.labels.ndim == 1 else whole.labels.argmax(1)
        chosen = held_out(first, whole.files.tolist(), fraction, self.seed)
        return whole.take(~chosen), whole.take(chosen)

    @property
    def _is_held_out(self) -> bool:
        lone = self.split is None and self.lists["val"] is None
        return lone and self._listed("train").splits is None

    def _listed(self, part: str) -> Listed:
        if self.split is not None:
            return read_list(self.split)
        if self.lists[part] is None:
            raise UserError(
                f"data.source.{part}: no list of images, got None; set data.source.{part}=<CSV or JSON file>"
            )
        return read_list(self.lists[part], *self.columns)

    def _read(self, part: str) -> LabelledSplit:
        listed = self._listed(part)
        folder = self.root or os.path.dirname(os.path.abspath(os.path.expanduser(self.lists[part])))
        files = _with_suffix(folder, listed.files)
        _check_files(folder, files, self.lists[part])
        labels = numbered(listed.labels, self.classes, self.separator, f"data.source.{part}")
        return LabelledSplit.of(folder, np.array([os.fsencode(file) for file in files], np.bytes_), labels)


def numbered(labels: list[str], classes: list[str], separator: str | None, where: str) -> np.ndarray:
    """Labels as positions in the class names, int64 (len,); with a separator bool (len, classes).

    Raises:
        ValueError: labels that no class has.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    each = [[text] if separator is None else several([text], separator) for text in labels]
    different = {name for names in each for name in names}
    if not different & label_of.keys() and all(name.isdecimal() for name in different):
        label_of = {str(label): label for label in range(len(classes))}
    if separator is None and "" in different:
        raise UserError(f"{where}: image {labels.index('') + 1} of the list has no label; give it one or remove it")
    if unknown := sorted(different - label_of.keys()):
        raise UserError(
            f"{where}: {len(unknown)} labels are no class, got {', '.join(map(repr, unknown[:SHOWN]))}, the "
            f"{len(classes)} classes are {', '.join(classes[:SHOWN])} …; mend the list or data.classes"
        )
    if separator is None:
        return np.array([label_of[name] for (name,) in each], np.int64)
    found = np.zeros((len(labels), len(classes)), bool)
    for row, names in enumerate(each):
        found[row, [label_of[name] for name in names]] = True
    return found


def _is(splits: list[str], names: tuple[str, ...]) -> np.ndarray:
    """Which rows are of the first of these splits that occurs."""
    name = next((name for name in names if name in splits), None)
    if name is None:
        raise UserError(
            f"data.source.train: its column split must have {names[0]}, got {', '.join(sorted(set(splits))[:SHOWN])}; "
            "mend the list, or give data.source.val"
        )
    return np.array([split == name for split in splits])


def _with_suffix(folder: str, files: list[str]) -> list[str]:
    """Files by the names that they have: a list of numbers or stems lacks the suffix of all of them."""
    if os.path.exists(os.path.join(folder, files[0])):
        return files
    for suffix in EXTENSIONS:
        for spelled in (suffix, suffix.upper()):
            if os.path.exists(os.path.join(folder, files[0] + spelled)):
                return [file + spelled for file in files]
    return files


def _check_files(folder: str, files: list[str], place: str | os.PathLike | None) -> None:
    looked = files[:: max(1, len(files) // CHECKED)]
    missing = [file for file in looked if not os.path.isfile(os.path.join(folder, file))]
    if missing:
        raise UserError(
            f"data.source: {len(missing)} of {len(looked)} files of {printable(place or 'split.csv')} that were looked "
            f"for are not below {folder}, got {', '.join(map(printable, missing[:SHOWN]))}; set data.root"
        )
