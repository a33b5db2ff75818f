"""`split.csv`: which files of a folder are for training and which for validation, as a run chose them.

Columns: file (relative to the root), class, label, split (train or val). Whoever has the file has the same split,
although files were added to the folder since.
"""

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import put

NAME = "split.csv"


def write_split(path: Path, rows: list[tuple[str, str, int, str]]) -> None:
    """Writes (file, class, label, split) rows; a file that is there is replaced at once or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "class", "label", "split"))
    writer.writerows(rows)
    put(path, text.getvalue().encode(errors="surrogateescape"))


def leave_split(source: Any, folder: Path) -> None:
    """Writes the split of a source that made one into a folder."""
    rows = source.kept_split() if hasattr(source, "kept_split") else []
    if rows:
        write_split(folder / NAME, rows)


def take_split(source: Any, folder: Path) -> None:
    """Lets a source that has read nothing yet split as the `split.csv` of a folder says, where there is one."""
    source = getattr(source, "whole", source)  # of a part (`data.sources.part`)
    if hasattr(source, "split") and (folder / NAME).is_file():
        source.split = folder / NAME


def rows_of(files: np.ndarray, labels: np.ndarray, classes: list[str], split: str, below: str = "") -> list[tuple]:
    """The rows of one split; `below` stands in front of its files."""
    names = (os.path.join(below, os.fsdecode(file)) for file in files.tolist())
    return [
        (name.replace(os.sep, "/"), classes[label], label, split)
        for name, label in zip(names, labels.tolist(), strict=True)
    ]
