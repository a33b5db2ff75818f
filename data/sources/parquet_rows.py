"""Rows of Parquet files, read where they lie, also on the hub: nothing is downloaded as a whole, prepared or copied.

The footers of the files say how many rows each group has, and the column of labels is read at the start; images are
read group by group when they are asked for. So every row has a position, as in files on disk: the order is exact,
whatever the number of workers, and a run resumes in the middle of an epoch. The price: a group is read by every worker
that draws from it, and only groups that are read together are mixed (`data.order.sampler.by_blocks`).
"""

import os
from collections import OrderedDict
from typing import Any

import numpy as np

from conf.errors import UserError
from conf.folders import printable

MAX_ROWS = 2**30  # of a file; one of a few bytes may claim as many labels as it likes
KEPT = 5  # groups that a process keeps in memory: those that are mixed, and the next


class ParquetRows:
    """Rows `start … end` of some files in order, seen as one table.

    Args:
        files: local paths or addresses (`hf://…`).
        image: the column of images, of which single rows are asked for.
        label: the column of labels.
    """

    def __init__(self, files: list[str], image: str, label: str) -> None:
        self.files, self.image = files, image
        self._open: dict[tuple[int, int], Any] = {}  # for each process and file
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        places, counts, labels, sizes = [], [], [], []
        for number in range(len(files)):
            file = self._file(number)
            labels.append(_labels(file, files[number], label))
            places += [(number, group) for group in range(file.num_row_groups)]
            sizes += [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
            counts += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self.places, self.ends = places, np.cumsum(counts, dtype=np.int64)
        self.group_bytes = np.array(sizes, np.int64)
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def blocks(self, numbers: np.ndarray) -> np.ndarray:
        """How many of these rows lie in each group."""
        return np.bincount(np.searchsorted(self.ends, numbers, "right"), minlength=len(self.ends))

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Bytes of the groups that some rows lie in, by the footers of the files (`data.order.fingerprint`)."""
        return self.group_bytes[np.searchsorted(self.ends, numbers, "right")]

    def __getitem__(self, number: int) -> dict[str, Any]:
        group = int(np.searchsorted(self.ends, number, "right"))
        first = int(self.ends[group - 1]) if group else 0
        return {self.image: self._group(group)[number - first].as_py()}

    def _group(self, group: int) -> Any:
        """The images of a group, as they are encoded."""
        key = os.getpid(), group
        if key not in self._groups:
            number, within = self.places[group]
            try:
                self._groups[key] = (
                    self._file(number).read_row_group(within, [self.image], use_threads=False).column(self.image)
                )
            except OSError as error:
                raise UserError(
                    f"HuggingFace: rows cannot be read, got group {within} of {self.files[number]} ({error}); try "
                    "again, or set data.source.streaming=false"
                ) from error
        self._groups.move_to_end(key)
        while len(self._groups) > KEPT:
            self._groups.popitem(last=False)
        return self._groups[key]

    def _file(self, number: int) -> Any:
        key = os.getpid(), number
        if key not in self._open:
            self._open[key] = _opened(self.files[number])
        return self._open[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_groups": OrderedDict()}


def _labels(file: Any, name: str, label: str) -> np.ndarray:
    """The column of labels, one whole number for every row that the footer counts.

    Raises:
        ValueError: there is no such column, it has other things or none in a row, or more rows than memory is for.
    """
    import pyarrow

    rows = file.metadata.num_rows
    kind = file.schema_arrow.field(label).type if label in file.schema_arrow.names else None
    if kind is None or not pyarrow.types.is_integer(kind):
        raise UserError(
            f"HuggingFace: labels must be whole numbers, got column {label} of {kind or 'no type'} in "
            f"{printable(name)}; set data.source.label to another column"
        )
    if rows > MAX_ROWS:
        raise UserError(
            f"HuggingFace: a Parquet file must have at most {MAX_ROWS} rows, got {rows} in {printable(name)}; "
            "cut it into parts"
        )
    column = file.read([label], use_threads=False).column(label)
    if column.null_count or len(column) != rows:
        what = f"{column.null_count} rows without one" if column.null_count else f"{len(column)} of {rows}"
        raise UserError(
            f"HuggingFace: every row must have a label, got {what} in {printable(name)}; leave these rows out"
        )
    return np.asarray(column).astype(np.int64)


def features_of(file: str) -> Any:
    """The columns of a Parquet file with their types, as `datasets` knows them."""
    from datasets import Features

    return Features.from_arrow_schema(_opened(file).schema_arrow)


def _opened(file: str) -> Any:
    import fsspec
    import pyarrow.parquet as parquet

    try:
        system, path = fsspec.core.url_to_fs(file)
        return parquet.ParquetFile(system.open(path, "rb"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"HuggingFace: no Parquet file can be read, got {file} ({error}); mend the file, or set "
            "data.source.streaming=false"
        ) from error


def chosen_rows(spec: str, length: int) -> np.ndarray:
    """The rows of a split of this length that an expression such as `train[:80%]+train[90%:]` means."""
    from datasets import ReadInstruction

    split = spec.partition("[")[0].partition("+")[0]
    pieces = ReadInstruction.from_spec(spec).to_absolute({split: length})
    return np.concatenate([np.arange(piece.from_, piece.to) for piece in pieces])


def files_of(path: str, name: str | None, options: dict[str, Any]) -> dict[str, list[str]]:
    """The Parquet files of each split of a data set, as `datasets` finds them.

    Raises:
        ValueError: it is in another format.
    """
    from datasets import load_dataset_builder

    builder = load_dataset_builder(path, name, **options)
    found = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    if not found or not all(file.endswith(".parquet") for files in found.values() for file in files):
        raise UserError(
            f"HuggingFace: streaming reads Parquet files, got {path} in another format; set "
            "data.source.streaming=false, or data.source.revision=refs/convert/parquet for a set on the hub"
        )
    return found
