"""A folder per class: `root/{train,val}/<class>/<image>`, torchvision's layout, or `root/<class>/<image>`, to be split.

Classes are the folders of `train` in alphabetical order; `val` may lack some but not add any. Evaluation alone
needs no `train`: classes are then the folders of `val`. Files and folders that begin with a dot are left out.

Where there is no folder for validation, a share of every class is held out by the hash of file names and the seed
(`data.order.stratified`); `data.sources.split_file` says how a run keeps it.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.folders import Layout, class_folders, classes_in, layout, printable, suffixes
from conf.lists import read_classes, read_list
from data.order.fingerprint import heads_on_disk, sizes_on_disk
from data.order.stratified import check_fraction, held_out
from data.sources.decode import read_image
from data.sources.form import Form
from data.sources.index import listed
from data.sources.split_file import rows_of

HELD_OUT = 0.2  # of each class, where there is no folder for validation and nothing else is said
SHOWN = 5  # names in a message


class FolderSplit:
    """The images of one split.

    Paths are kept as one array of bytes, not as Python strings: workers share it, where millions of strings would be
    copied into each of them, page by page, as they are counted.
    """

    def __init__(self, folder: str, classes: Sequence[str], index: str | os.PathLike | None = None) -> None:
        files, labels, self.left_out = listed(folder, classes, index)  # left out: no images by their suffix
        self._keep(folder, files, labels)

    @classmethod
    def of(cls, folder: str, files: np.ndarray, labels: np.ndarray) -> "FolderSplit":
        """These files, relative to a folder, with these labels."""
        split = cls(folder, ())
        split._keep(folder, files, labels)
        return split

    def _keep(self, folder: str, files: np.ndarray, labels: np.ndarray) -> None:
        self.folder, self.files, self.labels = folder, files, labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "FolderSplit":
        """Some of the images: by a mask, or by positions."""
        return self.of(self.folder, self.files[chosen], self.labels[chosen])

    def relative_path(self, index: int) -> str:
        """`<class>/<image>`."""
        return os.fsdecode(self.files[index].item())

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.relative_path(index))

    def sizes(self, places: np.ndarray) -> list[int]:
        """Bytes of some files (`data.order.fingerprint`)."""
        return sizes_on_disk([self.path(place) for place in places.tolist()])

    def contents(self, places: np.ndarray) -> list[int]:
        """Numbers for what some files begin with."""
        return heads_on_disk([self.path(place) for place in places.tolist()])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.path(index)), int(self.labels[index])

    def read(self, index: int, form: Form) -> np.ndarray:
        """An image in another form than 8-bit RGB."""
        return read_image(self.path(index), form=form)


class ImageFolder:
    """Images in class folders; the folders are read when a split is first asked for.

    Args:
        root: the folder that holds `train` and `val`, or the class folders.
        val_fraction: the share of every class that is held out where there is no folder for validation; `None` for
            a fifth. 1 takes all images for validation, to evaluate them.
        split: a `split.csv` that says which files are for training and which for validation.
        classes: a file of class names in the order of their labels, which may be some of the folders.
        seed: names what is held out.
        index: where it is kept what lies below the root (`data.sources.index`).
    """

    embedded = False

    def __init__(
        self,
        root: str | os.PathLike | None,
        val_fraction: float | None = None,
        split: str | os.PathLike | None = None,
        classes: str | os.PathLike | None = None,
        seed: int = 0,
        index: str | os.PathLike | None = "auto",
    ) -> None:
        self.index = index
        self.root = None if root is None else os.path.expanduser(root)
        self.val_fraction, self.split, self.named, self.seed = val_fraction, split, classes, seed

    @cached_property
    def classes(self) -> list[str]:
        """Raises `ValueError` when the tree is not as expected."""
        places = self._layout
        if self.named is not None:
            return self._named(places.train or places.val)
        if self.split is not None:
            return list(read_list(self.split).classes)
        return classes_in(places.train or places.val, self.root)

    @cached_property
    def train(self) -> FolderSplit:
        if self._layout.train is None and self.split is None:
            class_folders(self.root, "train")  # where there is only val, training says what is missing
        if self._divided is not None:
            return self._divided[0]
        return FolderSplit(str(self._layout.train), self.classes, self.index)

    @cached_property
    def val(self) -> FolderSplit:
        if self._divided is not None:
            return self._divided[1]
        folder = self._layout.val
        unknown = sorted(set(classes_in(folder, self.root)) - set(self.classes)) if self.named is None else []
        if unknown:
            raise UserError(
                f"ImageFolder: classes in val that train lacks, got {', '.join(unknown[:SHOWN])} "
                f"({len(unknown)} in {folder}); give train and val the same class folders"
            )
        return FolderSplit(str(folder), self.classes, self.index)

    def notes(self) -> list[str]:
        """What a run says about its images in its first lines, when it has read them."""
        found = [] if self._divided is None else [self._split_in_words()]
        found += self._left_out_in_words()
        if self._layout.val is not None and self._layout.val.name != "val":
            found.append(f"{self._layout.val.name}/ is the validation set")
        return found

    def kept_split(self) -> list[tuple[str, str, int, str]]:
        """The rows of `split.csv` where the images were split here; none where folders say it."""
        if self._divided is None:
            return []
        below = os.path.relpath(self.train.folder, self.root)
        below = "" if below == "." else below
        parts = (("train", self.train), ("val", self.val))
        return [row for name, part in parts for row in rows_of(part.files, part.labels, self.classes, name, below)]

    @cached_property
    def _layout(self) -> Layout:
        return layout(self.root)

    @cached_property
    def _whole(self) -> FolderSplit:
        """All images where they are to be split."""
        return FolderSplit(str(self._layout.train), self.classes, self.index)

    @cached_property
    def _divided(self) -> tuple[FolderSplit, FolderSplit] | None:
        """Training and validation where they are no folders; `None` where they are."""
        if self.split is not None:
            return self._as_listed()
        if self._layout.val is not None:
            if self.val_fraction is not None:
                raise UserError(
                    f"data.val_fraction: {self._layout.val} is the validation set, got {self.val_fraction}; "
                    "leave data.val_fraction out, or move that folder away"
                )
            return None
        fraction = HELD_OUT if self.val_fraction is None else check_fraction(self.val_fraction, "data.val_fraction")
        chosen = held_out(self._whole.labels, self._whole.files.tolist(), fraction, self.seed)
        return self._whole.take(~chosen), self._whole.take(chosen)

    def _as_listed(self) -> tuple[FolderSplit, FolderSplit]:
        """The splits of a `split.csv`.

        Raises:
            ValueError: it has no column for the split, or files that are not there.
        """
        listed = read_list(self.split)
        if listed.splits is None or not set(listed.splits) <= {"train", "val"}:
            raise UserError(
                f"data.split: must have a column split of train and val, got {printable(self.split)} without; "
                "give the split.csv of a run"
            )
        folder, files = self._base(listed.files)
        if away := [name for name in files if os.path.isabs(name) or ".." in name.split("/")]:
            raise UserError(
                f"data.split: files must lie below the root, got {printable(away[0])} in {printable(self.split)}; give "
                "the split.csv of a run"
            )
        missing = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
        if missing:
            raise UserError(
                f"data.split: {len(missing)} files of {printable(self.split)} are not below {folder}, got "
                f"{', '.join(map(printable, missing[:SHOWN]))}; put them back, or set data.split=null to split anew"
            )
        label_of = {name: label for label, name in enumerate(self.classes)}
        if wrong := sorted(set(listed.labels) - label_of.keys()):
            raise UserError(f"data.split: classes that data.classes lacks, got {', '.join(wrong[:SHOWN])}; add them")
        labels = np.array([label_of[name] for name in listed.labels], np.int64)
        whole = FolderSplit.of(folder, np.array([os.fsencode(name) for name in files], np.bytes_), labels)
        training = np.array([split == "train" for split in listed.splits])
        return whole.take(training), whole.take(~training)

    def _base(self, files: list[str]) -> tuple[str, list[str]]:
        """The folder that all files are named below: `train`, so that names begin with the class, or the root."""
        train = self._layout.train
        below = "" if train is None or self._layout.flat else f"{train.name}/"
        if below and all(file.startswith(below) for file in files):
            return str(train), [file.removeprefix(below) for file in files]
        return os.fspath(self.root), files

    def _split_in_words(self) -> str:
        counts = f"{len(self.train)} images for training, {len(self.val)} for validation"
        if self.split is not None:
            name = printable(os.path.relpath(self.split))
            more = len(FolderSplit(str(self._layout.train), self.classes)) - len(self.train) - len(self.val)
            new = f"; {more} images that it lacks are left out" if more > 0 else ""
            return f"{name if len(name) < 60 else Path(self.split).name}: {counts}{new}"
        fraction = HELD_OUT if self.val_fraction is None else self.val_fraction
        lone = [self.classes[i] for i in np.flatnonzero(np.bincount(self._whole.labels) == 1)]
        alone = f"; {', '.join(lone[:SHOWN])}: one image, for training alone" if lone and fraction < 1 else ""
        missing = "train/ and val/" if self._layout.flat else "val/"
        return f"no {missing}: {counts}, {100 * fraction:.4g} % of each class by seed {self.seed} (split.csv){alone}"

    def _left_out_in_words(self) -> list[str]:
        """The files of what was read so far that are no images by their suffix."""
        read = [self.__dict__[name] for name in ("train", "val", "_whole") if name in self.__dict__]
        files = [file for split in read for file in split.left_out]
        if not files:
            return []
        what = (
            "files are left out, by their suffix they are"
            if len(files) > 1
            else "file is left out, by its suffix it is"
        )
        return [f"{len(files)} {what} no image: {suffixes(files)}"]

    def _named(self, folder: Path) -> list[str]:
        names, there = read_classes(self.named), set(classes_in(folder, self.root))
        if lacking := [name for name in names if name not in there]:
            raise UserError(
                f"data.classes: {len(lacking)} of {len(names)} classes have no folder in {folder}, got "
                f"{', '.join(lacking[:SHOWN])}; give the names of folders"
            )
        return names

    def _folder(self, split: str) -> str:
        return os.path.join(os.fspath(self.root), split)
