"""A folder per class: `root/{train,val}/<class>/<image>`, torchvision's layout.

Classes are the folders of `train` in alphabetical order; `val` may lack some but not add any. Evaluation alone
needs no `train`: classes are then the folders of `val`. Files and folders that begin with a dot are left out.
"""

import os
from functools import cached_property

import numpy as np
from PIL import Image

from conf.errors import UserError
from conf.folders import class_folders, class_split, image_files
from data.sources.decode import read_image


class FolderSplit:
    """The images of one split.

    Paths are kept as one array of bytes, not as Python strings: workers share it, where millions of strings would be
    copied into each of them, page by page, as they are counted.
    """

    def __init__(self, folder: str, classes: list[str]) -> None:
        self.folder = folder
        files: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = [os.fsencode(os.path.join(name, file)) for file in image_files(os.path.join(folder, name))]
            files += found
            labels += [label] * len(found)
        self.files = np.array(files, dtype=np.bytes_)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def relative_path(self, index: int) -> str:
        """`<class>/<image>`."""
        return os.fsdecode(self.files[index].item())

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.relative_path(index))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.path(index)), int(self.labels[index])


class ImageFolder:
    """Images in class folders; the folders are read when a split is first asked for.

    Args:
        root: the folder that holds `train` and `val`.
    """

    embedded = False

    def __init__(self, root: str | os.PathLike | None) -> None:
        self.root = root

    @cached_property
    def classes(self) -> list[str]:
        """Raises `ValueError` when the tree is not as expected."""
        return class_folders(self.root, class_split(self.root))

    @cached_property
    def train(self) -> FolderSplit:
        class_folders(self.root, "train")  # where there is only val, training says what is missing
        return FolderSplit(self._folder("train"), self.classes)

    @cached_property
    def val(self) -> FolderSplit:
        unknown = sorted(set(class_folders(self.root, "val")) - set(self.classes))
        if unknown:
            raise UserError(
                f"ImageFolder: classes in val that train lacks, got {', '.join(unknown[:5])} "
                f"({len(unknown)} in {self._folder('val')}); give train and val the same class folders"
            )
        return FolderSplit(self._folder("val"), self.classes)

    def _folder(self, split: str) -> str:
        return os.path.join(os.fspath(self.root), split)
