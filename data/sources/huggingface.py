"""Data sets in the format of Hugging Face `datasets`: from the hub, from a folder of images or from Parquet files.

Images are decoded here, not by `datasets`, so that all sources treat modes and orientation alike. The data set is
map-style: prepared once in the cache of `datasets`, then read in any order.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from conf.errors import UserError
from data.sources.decode import read_image
from data.sources.form import RGB, Form


class HuggingFaceSplit:
    """One split: rows with an encoded image and an integer label."""

    def __init__(self, rows: Any, image: str, label: str) -> None:
        self.rows, self.image = rows, image
        self.labels = np.asarray(rows.with_format("numpy", columns=[label])[:][label]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index), int(self.labels[index])

    def read(self, index: int, form: Form = RGB) -> Image.Image | np.ndarray:
        """An image, in another form as an array."""
        file = self.rows[index][self.image] or {"path": None, "bytes": None}
        name = f"row {index}" + (f" ({file['path']})" if file["path"] else "")
        return read_image(file["path"] if file["bytes"] is None else file["bytes"], name, form)


class HuggingFace:
    """A data set that `datasets.load_dataset` can read; the package is imported when data is first read.

    Args:
        path: a hub id (`uoft-cs/cifar10`), or the name of a format (`parquet`, `imagefolder`) with `data_dir`
            or `data_files`.
        name: configuration of the data set, if it has several.
        data_dir, data_files: where the files of a format are; one of them is required for a format, because
            `datasets` would search the whole working directory otherwise.
        train, val: names of the splits; `train[:90%]` and the like are understood.
        image, label: columns; found by their types when `None`.
        revision: commit or tag on the hub, to keep a result reproducible.
        cache_dir: where `datasets` keeps prepared data; its own default when `None`.
    """

    embedded = False
    FORMATS = ("parquet", "imagefolder", "arrow")

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_dir: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
        train: str = "train",
        val: str = "validation",
        image: str | None = None,
        label: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        if path not in self.FORMATS and "/" not in path and not os.path.isdir(os.path.expanduser(path)):
            raise UserError(
                f"HuggingFace: path must be owner/name on the hub, a folder, or one of {', '.join(self.FORMATS)}, "
                f"got {path!r}; set data.source.path"
            )
        self.path, self.name, self.revision, self.cache_dir = path, name, revision, cache_dir
        self.data_dir, self.data_files = data_dir, _plain(data_files)
        self.names = {"train": train, "val": val}
        self.image, self.label = image, label

    @property
    def train(self) -> HuggingFaceSplit:
        return self._splits["train"]

    @property
    def val(self) -> HuggingFaceSplit:
        return self._splits["val"]

    @cached_property
    def classes(self) -> list[str]:
        """Names of the label column, or the labels themselves when it is a plain integer."""
        feature = self._rows["train"].features[self._columns[1]]
        if hasattr(feature, "names"):
            return list(feature.names)
        return [str(label) for label in range(int(self.train.labels.max(initial=-1)) + 1)]

    @cached_property
    def _rows(self) -> dict[str, Any]:
        from datasets import load_dataset

        if self.path in self.FORMATS and self.data_dir is None and self.data_files is None:
            raise UserError(
                f"HuggingFace: no files, got path={self.path} alone; set data.source.data_dir or data.source.data_files"
            )
        options = {"data_dir": self.data_dir, "data_files": self.data_files, "revision": self.revision}
        options["cache_dir"] = self.cache_dir
        return {part: self._load(load_dataset, split, options) for part, split in self.names.items()}

    def _load(self, load: Any, split: str, options: dict[str, Any]) -> Any:
        path = os.path.expanduser(self.path)
        try:
            return load(path, self.name, split=split, **options)
        except ValueError as error:
            if "split" not in str(error).lower():
                raise
            known = ", ".join(load(path, self.name, **options))
            raise UserError(
                f"HuggingFace: no such split in {self.path}, got {split}, there are {known}; "
                "set data.source.train and data.source.val"
            ) from error

    @cached_property
    def _columns(self) -> tuple[str, str]:
        """Names of the image and the label column."""
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        features = self._rows["train"].features
        images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
        labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        labels = labels or [name for name in ("label", "labels") if name in features]
        image = self._pick("image", self.image, images, features)
        label = self._pick("label", self.label, labels, features)
        if "int" not in getattr(features[label], "dtype", ""):
            raise UserError(
                f"HuggingFace: labels must be classes or whole numbers, got column {label} of {features[label]}; "
                "set data.source.label to another column, or encode it with datasets' class_encode_column"
            )
        return image, label

    def _pick(self, kind: str, wanted: str | None, candidates: list[str], features: Mapping[str, Any]) -> str:
        if wanted in features:
            return wanted
        if wanted is None and len(candidates) == 1:
            return candidates[0]
        raise UserError(
            f"HuggingFace: the {kind} column is not clear, got data.source.{kind}={wanted}, the columns are "
            f"{', '.join(f'{name} ({type(feature).__name__})' for name, feature in features.items())}; "
            f"set data.source.{kind} to one of them"
        )

    @cached_property
    def _splits(self) -> dict[str, HuggingFaceSplit]:
        from datasets import Image as ImageFeature

        image, label = self._columns
        raw = ImageFeature(decode=False)
        return {part: HuggingFaceSplit(rows.cast_column(image, raw), image, label) for part, rows in self._rows.items()}


def _plain(files: Any) -> Any:
    """Plain containers for OmegaConf's, which `datasets` does not know."""
    if isinstance(files, Mapping):
        return {key: _plain(value) for key, value in files.items()}
    if files is None or isinstance(files, str):
        return files
    return [str(file) for file in files]
