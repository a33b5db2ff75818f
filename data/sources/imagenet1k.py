"""ImageNet-1k (ILSVRC 2012) in class folders named by WordNet id, e.g. `n01440764`.

Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015 (arXiv 1409.0575).
The alphabetical order of the ids is the class order of all published checkpoints, so a folder with other names, or
with one class missing, would evaluate to noise: it is refused.
"""

import re
from functools import cached_property

from conf.errors import UserError
from conf.folders import class_folders, class_split
from data.sources.imagefolder import FolderSplit, ImageFolder

CLASSES = 1000
WORDNET_ID = re.compile(r"n\d{8}")


class ImageNet1k(ImageFolder):
    """`root/{train,val}/n01440764/….JPEG`, 1000 classes."""

    @cached_property
    def classes(self) -> list[str]:
        """Raises `ValueError` unless there are exactly 1000 folders named by WordNet id."""
        split = class_split(self.root)
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
    def val(self) -> FolderSplit:
        class_folders(self.root, "val")  # of ImageNet nothing is held out
        return super().val
