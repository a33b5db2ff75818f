"""The images that a user asks about: a file, a folder, a glob, a list of files, or several of these. Torch-free."""

import csv
import json
import os
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import NamedTuple

from conf.errors import UserError
from conf.folders import image_files, printable, suffixes
from conf.lists import FILE

LISTS = (".txt", ".csv", ".tsv", ".json", ".jsonl")


class Images(NamedTuple):
    """Paths of images, and in words what was left out of folders."""

    files: list[str]
    left_out: str


def images_of(given: str | Iterable[str]) -> Images:
    """The images that `input=` names, each once, in order.

    Args:
        given: a path or a glob, or several. A folder is looked through at any depth; a list (`.txt`, `.csv`, `.tsv`,
            `.json`, `.jsonl`) names files, relative to where it lies or to the working directory.

    Raises:
        UserError: nothing is there.
    """
    left_out: list[str] = []
    places = [given] if isinstance(given, str) else [str(place) for place in given]
    found = [file for place in places for file in _at(os.path.expanduser(place), left_out)]
    words = suffixes(left_out)
    if not found:
        raise UserError(
            f"input: no image, got {', '.join(map(printable, places))}{f' ({words} left out)' if words else ''}; "
            "give an image, a folder of images, a glob in quotes, or a list of files (.txt, .csv, .json)"
        )
    return Images(list(dict.fromkeys(found)), words)


def _at(place: str, left_out: list[str]) -> list[str]:
    path = Path(place)
    if path.is_dir():
        return [os.path.join(place, file) for file in image_files(path, left_out)]
    if path.is_file():
        return _listed(path) if path.suffix.lower() in LISTS else [place]
    matches = sorted(glob(place, recursive=True))
    if not matches:
        raise UserError(f"input: there is nothing at this path, got {printable(place)}; give one that is there")
    return [file for match in matches for file in _at(match, left_out)]


def _listed(path: Path) -> list[str]:
    """The files that a list names; where they are not, reading them will say so."""
    try:
        names = _rows(path)
    except (ValueError, OSError, TypeError, LookupError, RecursionError, csv.Error) as error:
        raise UserError(f"input: {printable(path)} is no list of files ({error}); give one file in a line") from error
    beside = [os.path.join(path.parent, name) for name in names]
    return [place if os.path.exists(place) else name for place, name in zip(beside, names, strict=True)]


def _rows(path: Path) -> list[str]:
    text = path.read_text("utf-8-sig", errors="surrogateescape")
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in lines]
    if path.suffix.lower() in (".json", ".jsonl"):
        rows = json.loads(text) if path.suffix.lower() == ".json" else [json.loads(line) for line in lines]
        return [_file_in(row) for row in (rows if isinstance(rows, list) else list(rows))]
    table = list(csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    header = [name.strip().lower() for name in table[0]] if table else []
    column = next((header.index(name) for name in FILE if name in header), None)
    return [row[column or 0] for row in (table if column is None else table[1:]) if len(row) > (column or 0)]


def _file_in(row: object) -> str:
    """Of a row of JSON: the text itself, the first of a list, or what is below the name of a column of files."""
    if isinstance(row, dict):
        row = next((row[name] for name in FILE if name in row), None)
    elif isinstance(row, list):
        row = row[0] if row else None
    if not isinstance(row, str):
        raise ValueError(f"no file in {row!r}")
    return row
