"""Lists of files and their labels, in CSV, TSV, JSON, JSON Lines or plain text, read without anything heavy.

The number of classes is needed while a configuration is composed, before torch is imported.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import UserError
from conf.folders import printable

# columns by the names that people give them, the first that is there
FILE = ("file", "files", "filename", "file_name", "path", "filepath", "file_path", "image", "image_path", "image_id")
FILE = (*FILE, "imageid", "img", "id", "name")
CLASS = ("class", "class_name", "classname", "category", "label", "labels", "target", "label_name", "category_id", "y")
NUMBER = ("label", "class_id", "class_index", "target", "category_id", "y")
SPLIT = ("split", "set", "subset", "partition", "fold")
# what the bytes of strangers end in: no UTF-8, no JSON, lists in the place of names, too deep, too long
BROKEN = (ValueError, TypeError, LookupError, AttributeError, RecursionError, csv.Error)
DELIMITERS = ",;\t|"


class Listed(NamedTuple):
    """The rows of a list: files as they are written there, the text of their labels, their splits where it has any."""

    files: list[str]
    labels: list[str]
    splits: list[str] | None
    classes: list[str]  # every label that occurs: by number, else by name


def read_list(path: str | os.PathLike, file: str | None = None, label: str | None = None) -> Listed:
    """A list of images and labels.

    Args:
        path: `.json` (a list of objects or pairs, or an object of file and label, or of class and files), `.jsonl`, or
            text with a delimiter or spaces; its first line may name the columns.
        file, label: columns; found by their names when `None`, else the first and the second.

    Raises:
        ValueError: there is no such file, or it is no list; says what is in it.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"list: there is no file, got {printable(place)}; give a CSV or JSON list of files and labels")
    return _read(str(place), place.stat().st_mtime_ns, file, label)


@lru_cache(maxsize=4)
def _read(path: str, changed: int, file: str | None, label: str | None) -> Listed:
    try:
        text = Path(path).read_text("utf-8-sig", errors="surrogateescape")
        header, rows = _json(text, path) if path.endswith((".json", ".jsonl")) else _table(text, path)
    except BROKEN as error:
        raise error if isinstance(error, UserError) else _wrong(path, f"no list that can be read ({error})") from error
    if not rows:
        raise _wrong(path, "no rows")
    places = [_column(header, file, FILE, 0, path), _column(header, label, CLASS, 1, path)]
    for number, row in enumerate(rows):
        if len(row) <= max(places):
            raise _wrong(path, f"row {number + 1 + (header is not None)} without a {'file' if not row else 'label'}")
    labels = [str(row[places[1]]) for row in rows]
    split = next((header.index(name) for name in SPLIT if name in header), None) if header else None
    number = next((header.index(name) for name in NUMBER if name in header), None) if header else None
    numbers = [str(row[number]) if number is not None and number < len(row) else "" for row in rows]
    splits = None if split is None else [str(row[split]).strip().lower() if split < len(row) else "" for row in rows]
    return Listed([str(row[places[0]]) for row in rows], labels, splits, _in_order(labels, numbers))


def read_classes(path: str | os.PathLike) -> list[str]:
    """Class names in the order of their labels: a line each, or a list in JSON; `imagenet` for ImageNet-1k's.

    Raises:
        ValueError: there is no such file, it names none, or one twice.
    """
    if str(path) == "imagenet":
        return imagenet_classes()
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(
            f"data.classes: there is no file, got {printable(place)}; give a text file of class names, or imagenet"
        )
    try:
        text = place.read_text("utf-8-sig")
        found = json.loads(text) if place.suffix == ".json" else text.splitlines()
        if isinstance(found, dict):  # {"0": name} or {name: 0}
            found = [
                name for _, name in sorted((int(v), k) if isinstance(v, int) else (int(k), v) for k, v in found.items())
            ]
        names = [str(name).strip() for name in found if str(name).strip()]
    except BROKEN as error:
        what = "JSON" if place.suffix == ".json" else "text"
        raise UserError(f"data.classes: no {what} in {place} ({error}); give a list of names") from error
    if not names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        what = f"{twice!r} twice" if twice else "none"
        raise UserError(f"data.classes: must name every class once, got {what} in {place}; mend the file")
    return names


@lru_cache(maxsize=1)
def imagenet_classes() -> list[str]:
    """The 1000 WordNet ids of ImageNet-1k in the order of all published checkpoints, from a file that timm has."""
    place = Path(find_spec("timm").submodule_search_locations[0], "data", "_info", "imagenet_synsets.txt")
    return place.read_text().split()


def count_listed(
    classes: str | os.PathLike | None,
    split: str | os.PathLike | None = None,
    listed: str | os.PathLike | None = None,
    file: str | None = None,
    label: str | None = None,
    separator: str | None = None,
) -> int:
    """Number of classes of a list of images, or of a `split.csv`: those that are named, or those that occur.

    Raises:
        ValueError: there is no list, or it cannot be read.
    """
    if classes is not None:
        return len(read_classes(classes))
    if listed is None and split is None:
        raise UserError("data.source.train: no list of images, got None; set data.source.train=<CSV or JSON file>")
    found = read_list(listed, file, label) if split is None else read_list(split)
    return len(found.classes) if separator is None else len(several(found.labels, separator))


def several(labels: Iterable[str], separator: str) -> list[str]:
    """Every class once, where an image may have several labels."""
    return in_order({name.strip() for text in labels for name in text.split(separator)} - {""})


def in_order(names: set[str]) -> list[str]:
    """Sorted, by value where all are numbers."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _table(text: str, path: str) -> tuple[list[str] | None, list[list[str]]]:
    """Columns, where the first line names them, and rows."""
    first = next(iter(text.splitlines()), "")
    delimiter = max(DELIMITERS, key=first.count)
    if first.count(delimiter) == 0:
        rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
    else:
        rows = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True) if row
        ]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    named = any(name in header for name in FILE) or any(name in header for name in CLASS)
    return (header, rows[1:]) if named else (None, rows)


def _json(text: str, path: str) -> tuple[list[str] | None, list[list[Any]]]:
    if path.endswith(".jsonl"):
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        found = json.loads(text)
    if isinstance(found, dict) and all(isinstance(value, list) for value in found.values()):
        if {"images", "annotations"} <= found.keys():
            return _coco(found)
        found = [[file, name] for name, files in found.items() for file in files]
    elif isinstance(found, dict):
        found = [[file, label] for file, label in found.items()]
    if not isinstance(found, list) or not all(isinstance(row, dict | list) for row in found):
        raise _wrong(path, "neither objects nor pairs of file and label")
    if found and isinstance(found[0], dict):
        names = list(found[0])
        if wrong := next((row for row in found if not isinstance(row, dict) or row.keys() != found[0].keys()), None):
            raise _wrong(path, f"an object with other keys than the first, {str(wrong)[:80]}")
        return [name.lower() for name in names], [[row[name] for name in names] for row in found]
    return None, found


def _coco(found: dict[str, list[dict]]) -> tuple[list[str], list[list[Any]]]:
    """The form of COCO and iNaturalist: images, categories, and annotations that join them."""
    files = {image["id"]: image["file_name"] for image in found["images"]}
    names = {category["id"]: category["name"] for category in found.get("categories", [])}
    pairs = [(one["image_id"], one["category_id"]) for one in found["annotations"]]
    return ["file", "class", "label"], [[files[i], names.get(c, c), c] for i, c in pairs]


def _column(header: list[str] | None, wanted: str | None, names: Sequence[str], place: int, path: str) -> int:
    if header is None and wanted is None:
        return place
    found = [wanted.lower()] if wanted is not None else names
    for name in found:
        if header is not None and name in header:
            return header.index(name)
    what = "file" if place == 0 else "label"
    columns = ", ".join(header) if header else "no names of columns"
    raise UserError(
        f"list: the {what} column is not clear, got {wanted} in {printable(path)} with {columns}; "
        f"set data.source.{what} to one of them"
    )


def _in_order(labels: Iterable[str], numbers: Iterable[str]) -> list[str]:
    """Every label once: by the number beside it where each has one of its own, by value where all are numbers."""
    pairs = set(zip(labels, numbers, strict=True))
    names = sorted({name for name, _ in pairs})
    whole = all(number.isdecimal() for _, number in pairs)
    if whole and len(pairs) == len(names) == len({number for _, number in pairs}):
        return [name for name, _ in sorted(pairs, key=lambda pair: int(pair[1]))]
    return in_order(set(names))


def _wrong(path: str, what: str) -> UserError:
    return UserError(f"list: must be a list of files and labels, got {what} in {printable(path)}; mend the file")
