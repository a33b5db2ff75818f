"""Data sets in the format of Hugging Face `datasets`: from the hub, from a folder of images or from Parquet files.

Images are decoded here, not by `datasets`, so that all sources treat modes and orientation alike. The data set is
map-style: prepared once in the cache of `datasets`, then read in any order.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from conf.errors import UserError
from conf.files import contents
from conf.folders import printable
from conf.values import flag
from data.order.spread import spread_over
from data.order.stratified import check_fraction, held_out
from data.sources.decode import UnreadableImage, read_image
from data.sources.form import RGB, Form
from data.sources.parquet_rows import ParquetRows, chosen_rows, features_of, files_of

MAX_CARD = 2**24  # bytes of what a folder says of its files
READ = 100  # images that are compared where reading a row is reading the image


class HuggingFaceSplit:
    """One split: rows with an encoded image and an integer label."""

    def __init__(
        self,
        rows: Any,
        image: str,
        labels: np.ndarray,
        numbers: np.ndarray | None = None,
        folders: Sequence[str] = (),
    ) -> None:
        self.rows, self.image, self.labels, self.folders = rows, image, labels, folders
        self.numbers = np.arange(len(rows)) if numbers is None else numbers  # of the rows that belong to it

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def blocks(self) -> np.ndarray | None:
        """Images of each group of rows where they are streamed; `None` where each is read by itself."""
        return self.rows.blocks(self.numbers) if isinstance(self.rows, ParquetRows) else None

    def take(self, chosen: np.ndarray) -> "HuggingFaceSplit":
        """Some of the images, by a mask or by rising positions."""
        return HuggingFaceSplit(self.rows, self.image, self.labels[chosen], self.numbers[chosen], self.folders)

    def keys(self) -> np.ndarray:
        """The numbers of the rows (`data.order.fingerprint`)."""
        return self.numbers.astype(np.uint64)

    def sizes(self, places: np.ndarray) -> list[int]:
        """Bytes of the groups of some rows, where they are streamed."""
        return self.rows.sizes(self.numbers[places]).tolist() if isinstance(self.rows, ParquetRows) else []

    def contents(self, places: np.ndarray) -> list[int]:
        """Numbers for what a few of some images hold; none where rows are streamed, which would read whole groups."""
        few = [] if isinstance(self.rows, ParquetRows) or not len(places) else spread_over(len(places), READ)
        files = [self.rows[int(self.numbers[places[place]])][self.image] or {} for place in few]
        return [zlib.crc32(file.get("bytes") or b"") for file in files]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index), int(self.labels[index])

    def read(self, index: int, form: Form = RGB) -> Image.Image | np.ndarray:
        """An image, in another form as an array."""
        number = int(self.numbers[index])
        file = self.rows[number][self.image] or {"path": None, "bytes": None}
        name = f"row {number}" + (f" ({file['path']})" if file["path"] else "")
        if file["bytes"] is None and not self._may_name(file["path"]):
            raise UnreadableImage(
                f"HuggingFace: a row must hold its image, or name a file of the data set, got {printable(name)}; put "
                "the images into the files, or load them as path=imagefolder"
            )
        return read_image(file["path"] if file["bytes"] is None else file["bytes"], name, form)

    def _may_name(self, path: str | None) -> bool:
        """Whether rows may name a file: one below the folders of the data set."""
        return path is not None and any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in self.folders)


class HuggingFace:
    """A data set that `datasets.load_dataset` can read; the package is imported when data is first read.

    Args:
        path: a hub id (`uoft-cs/cifar10`), or the name of a format (`parquet`, `imagefolder`) with `data_dir`
            or `data_files`.
        name: configuration of the data set, if it has several.
        data_dir, data_files: where the files of a format are; one of them is required for a format, because
            `datasets` would search the whole working directory otherwise.
        train, val: names of the splits; `train[:90%]` and the like are understood. Rows are often sorted by class: to
            hold out a share of each, give `val_fraction`.
        image, label: columns; found by their types when `None`.
        revision: commit or tag on the hub, to keep a result reproducible.
        cache_dir: where `datasets` keeps prepared data; its own default when `None`.
        val_fraction: the share of every class that is held out of `train`, by hashes of row numbers, in place of `val`.
        streaming: read Parquet files where they lie, also on the hub, prepare nothing (`data.sources.parquet_rows`).
        seed: names what is held out.
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
        val_fraction: float | None = None,
        streaming: bool | None = None,
        seed: int = 0,
    ) -> None:
        if path not in self.FORMATS and "/" not in path and not os.path.isdir(os.path.expanduser(path)):
            raise UserError(
                f"HuggingFace: path must be owner/name on the hub, a folder, or one of {', '.join(self.FORMATS)}, "
                f"got {path!r}; set data.source.path"
            )
        self.path, self.name, self.revision, self.cache_dir = path, name, revision, cache_dir
        self.data_dir, self.data_files = data_dir, _plain(data_files)
        self.names = {"train": train} if val_fraction is not None else {"train": train, "val": val}
        self.val_fraction, self.seed = val_fraction, seed
        self.streaming = streaming is not None and flag(
            "HuggingFace", "streaming", streaming, fix="set data.source.streaming=true or false"
        )
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
        feature = self._features[self._columns[1]]
        if hasattr(feature, "names"):
            return list(feature.names)
        return [str(label) for label in range(self._first, int(self._numbers["train"].max(initial=-1)) + 1)]

    def notes(self) -> list[str]:
        """How a share was held out, that labels were counted from another number, and that rows are streamed."""
        found = []
        if self.val_fraction is not None:
            found.append(
                f"{self.names['train']}: {len(self.train)} images for training, {len(self.val)} for validation, "
                f"{100 * self.val_fraction:.4g} % of each class by seed {self.seed}"
            )
        if self._first > 0:
            found.append(f"labels {self.classes[0]} to {self.classes[-1]} are counted from 0")
        if self.streaming:
            found.append(f"rows are streamed, in {len(self.train.blocks)} groups, a few mixed at a time")
        return found

    @cached_property
    def _options(self) -> dict[str, Any]:
        if self.path in self.FORMATS and self.data_dir is None and self.data_files is None:
            raise UserError(
                f"HuggingFace: no files, got path={self.path} alone; set data.source.data_dir or data.source.data_files"
            )
        _refuse_addresses(Path(self.path).expanduser())
        options = {"data_dir": self.data_dir, "data_files": self.data_files, "revision": self.revision}
        return options | {"cache_dir": self.cache_dir}

    @cached_property
    def _rows(self) -> dict[str, Any]:
        """The rows of each part, not streamed."""
        from datasets import load_dataset

        return {part: self._load(load_dataset, split, self._options) for part, split in self.names.items()}

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """The Parquet files of every split, where they are streamed."""
        try:
            return files_of(os.path.expanduser(self.path), self.name, self._options)
        except UserError:
            raise
        except Exception as error:
            raise _unreadable(self.path, error) from error

    @cached_property
    def _features(self) -> Any:
        """The columns, by name, with their types."""
        return features_of(next(iter(self._files.values()))[0]) if self.streaming else self._rows["train"].features

    def _load(self, load: Any, split: str, options: dict[str, Any]) -> Any:
        path = os.path.expanduser(self.path)
        try:
            return load(path, self.name, split=split, **options)
        except Exception as error:  # of datasets: many kinds, also for a script, which it does not run
            if not isinstance(error, ValueError) or "split" not in str(error).lower():
                raise _unreadable(self.path, error) from error
            known = ", ".join(load(path, self.name, **options))
            raise UserError(
                f"HuggingFace: no such split in {self.path}, got {split}, there are {known}; "
                "set data.source.train and data.source.val, or data.val_fraction to hold out a share"
            ) from error

    @cached_property
    def _columns(self) -> tuple[str, str]:
        """Names of the image and the label column."""
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        features = self._features
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
        splits = {
            part: HuggingFaceSplit(
                self._images[part], self._columns[0], labels - self._first, self._chosen.get(part), self._folders
            )
            for part, labels in self._numbers.items()
        }
        if self.val_fraction is None:
            return splits
        fraction, whole = check_fraction(self.val_fraction, "data.val_fraction"), splits["train"]
        chosen = held_out(whole.labels, [str(number) for number in whole.numbers.tolist()], fraction, self.seed)
        return {"train": whole.take(~chosen), "val": whole.take(chosen)}

    @cached_property
    def _folders(self) -> list[str]:
        """What rows may name files in: folders of images here, or what `datasets` has downloaded and unpacked.

        Parquet and Arrow files hold their images; the rows of a stranger's could name any file of this machine.
        """
        if self.path in ("parquet", "arrow"):
            return []
        given = [self.data_dir, *_files_in(self.data_files), *([self.path] if "/" in self.path else [])]
        here = [os.path.abspath(os.path.expanduser(str(place))) for place in given if place is not None]
        from datasets import config

        caches = [self.cache_dir or config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.HF_CACHE_HOME]
        return [place if os.path.isdir(place) else os.path.dirname(place) for place in here] + [*map(str, caches)]

    @cached_property
    def _first(self) -> int:
        """What labels are counted from: 0, or in a column of plain integers the smallest."""
        labels = self._numbers["train"]
        named = hasattr(self._features[self._columns[1]], "names")
        return 0 if named or len(labels) == 0 else max(0, int(labels.min()))

    @cached_property
    def _images(self) -> dict[str, Any]:
        """What gives the encoded image of a row, of each part."""
        image, label = self._columns
        if not self.streaming:
            from datasets import Image as ImageFeature

            return {part: rows.cast_column(image, ImageFeature(decode=False)) for part, rows in self._rows.items()}
        splits = {part: spec.partition("[")[0] for part, spec in self.names.items()}
        if unknown := [split for split in splits.values() if split not in self._files]:
            raise UserError(
                f"HuggingFace: no such split in {self.path}, got {unknown[0]}, there are {', '.join(self._files)}; "
                "set data.source.train and data.source.val, or data.val_fraction to hold out a share"
            )
        tables = {split: ParquetRows(self._files[split], image, label) for split in set(splits.values())}
        return {part: tables[split] for part, split in splits.items()}

    @cached_property
    def _chosen(self) -> dict[str, np.ndarray]:
        """The rows that an expression such as `train[:80%]` means, where they are streamed."""
        images = self._images if self.streaming else {}
        return {part: chosen_rows(self.names[part], len(rows)) for part, rows in images.items()}

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        """The labels of each part as they are written."""
        label = self._columns[1]
        if self.streaming:
            return {part: rows.labels[self._chosen[part]] for part, rows in self._images.items()}
        columns = {part: rows.with_format("numpy", columns=[label])[:][label] for part, rows in self._rows.items()}
        return {part: np.asarray(column).astype(np.int64) for part, column in columns.items()}


def _unreadable(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"HuggingFace: the data set cannot be read, got {path} ({type(error).__name__}: {reason}); mend its files, or "
        "set data.source.path to another"
    )


def _refuse_addresses(folder: Path) -> None:
    """What a folder says of its files may not be an address, which `datasets` would ask: whoever sent it would know.

    Raises:
        UserError: with the file that says it.
    """
    for name in ("README.md", ".huggingface.yaml"):
        try:
            lines = contents(folder / name, MAX_CARD).decode("utf-8", "replace").splitlines()
            if name == "README.md":  # between its first two lines of dashes
                lines = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] else []
            said = yaml.safe_load("\n".join(lines))
        except UserError:  # of no size that it should have
            raise
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        if isinstance(said, dict) and "://" in str(said.get("configs")):
            raise UserError(
                f"HuggingFace: a folder must hold its files, got addresses in {printable(folder / name)}; put files "
                "there and take the addresses out, or give path=parquet and data.source.data_files"
            )


def _files_in(files: Any) -> list[str]:
    """The files of `data_files`, however they are grouped."""
    if isinstance(files, Mapping):
        return [file for part in files.values() for file in _files_in(part)]
    return [files] if isinstance(files, str) else list(files or ())


def _plain(files: Any) -> Any:
    """Plain containers for OmegaConf's, which `datasets` does not know."""
    if isinstance(files, Mapping):
        return {key: _plain(value) for key, value in files.items()}
    if files is None or isinstance(files, str):
        return files
    return [str(file) for file in files]
