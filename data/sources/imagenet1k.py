"""ImageNet-1k (ILSVRC 2012) in class folders named by WordNet id, e.g. `n01440764`.

Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015 (arXiv 1409.0575).
The alphabetical order of the ids is the class order of all published checkpoints, so a folder with other names, or
with one class missing, would evaluate to noise: it is refused. The validation images may lie in one folder, as they
are published, with the list of their labels near it (`data.sources.imagenet_labels`).
"""

import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from conf.errors import UserError
from conf.folders import class_folders, class_split, image_files
from conf.lists import imagenet_classes
from data.sources.imagefolder import FolderSplit, ImageFolder
from data.sources.imagenet_labels import find_labels, read_labels

CLASSES = 1000
WORDNET_ID = re.compile(r"n\d{8}")


class ImageNet1k(ImageFolder):
    """`root/{train,val}/n01440764/….JPEG`, 1000 classes.

    Args:
        root: the folder that holds `train` and `val`.
        val_labels: the list of labels where `val` has no class folders; searched for near `root` when `None`.
        index: see `ImageFolder`.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        val_labels: str | os.PathLike | None = None,
        index: str | os.PathLike | None = "auto",
    ) -> None:
        super().__init__(root, index=index)
        self.val_labels = val_labels

    @cached_property
    def classes(self) -> list[str]:
        """Raises `ValueError` unless there are exactly 1000 folders named by WordNet id."""
        split = class_split(self.root)
        if split == "val" and self._in_one_folder:
            return list(imagenet_classes())
        names, folder = class_folders(self.root, split), self._folder(split)
        wrong = [name for name in names if not WORDNET_ID.fullmatch(name)]
        if wrong:
            raise UserError(
                f"ImageNet1k: folders that are no WordNet id (n and 8 digits), got {', '.join(wrong[:5])} in "
                f"{folder}; remove them, or use data=imagefolder for other images"
            )
        if len(names) != CLASSES:
            raise UserError(
                f"ImageNet1k: {CLASSES} class folders expected, got {len(names)} in {folder}; "
                "add the missing ones, or use data=imagefolder for a subset"
            )
        return names

    @cached_property
    def train(self) -> FolderSplit:
        class_folders(self.root, "train")
        return FolderSplit(self._folder("train"), self.classes, self.index)

    @cached_property
    def val(self) -> FolderSplit:
        if not self._in_one_folder:
            class_folders(self.root, "val")  # of ImageNet nothing is held out
            return super().val
        folder = Path(self._folder("val"))
        files = list(image_files(folder))
        path = find_labels(Path(self.root)) if self.val_labels is None else Path(self.val_labels).expanduser()
        if not path.is_file():
            raise UserError(
                f"ImageNet1k: there is no list of validation labels, got {path}; set data.source.val_labels"
            )
        labels = read_labels(path, files)
        return FolderSplit.of(str(folder), np.array([os.fsencode(file) for file in files], np.bytes_), labels)

    def notes(self) -> list[str]:
        """What was left out by its suffix; the split is ImageNet's."""
        return self._left_out_in_words()

    def kept_split(self) -> list[tuple[str, str, int, str]]:
        """Nothing: the split is ImageNet's."""
        return []

    @cached_property
    def _in_one_folder(self) -> bool:
        """Whether the validation images lie without class folders."""
        folder = Path(self.root or "", "val")
        if not self.root or not folder.is_dir():
            return False
        with os.scandir(folder) as entries:
            return not any(entry.is_dir() for entry in entries if not entry.name.startswith(".")) and any(
                True for _ in image_files(folder)
            )
