"""What has changed in a data set since a run began, in words: classes, and single files where names were kept."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from conf.files import put
from data.order.fingerprint import LOOKED_INTO, contents_of, looked_at, sizes_of

KEPT = 2_000_000  # names of files that are kept beside a run, to say which one has changed
NAME = "data.npz"
SHOWN = 3  # of each kind of change in a message


def check_same(before: dict[str, Any], after: dict[str, Any], names: "Names | None" = None) -> None:
    """Refuses to go on with other data.

    Args:
        before, after: fingerprints, of the checkpoint and of the data that is there.
        names: of the files of both, where they were kept.

    Raises:
        ValueError: one sentence that says what has changed.
    """
    if found := changes(before, after, names):
        raise UserError(
            f"resume: the data is not that of the checkpoint: {'; '.join(found)}; put it back as it was, or start a "
            "new run from the weights: init=<checkpoint> and another run.name"
        )


def changes(before: dict[str, Any], after: dict[str, Any], names: "Names | None" = None) -> list[str]:
    """What is different between two fingerprints, a phrase each; [] where nothing is.

    Args:
        before, after: of the checkpoint, and of the data that is there.
        names: of the files of both, where they were kept.
    """
    if before["classes"] != after["classes"]:
        return _of_classes(before, after)
    found = []
    for part in ("train", "val"):
        was, now = before.get(part), after.get(part)
        if None in (was, now):
            continue
        now = {key: now[key] for key in was}  # an older fingerprint knows less
        if was != now:
            of_files = names.changes(part) if names is not None else []
            phrases = of_files or _of_images(was, now, after["classes"]) or [_otherwise(was, now)]
            found += [f"{part}: {phrase}" for phrase in phrases]
    return found


def _of_classes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Which classes have another name, are gone or are new."""
    was, now = before["classes"], after["classes"]
    gone, new = ([name for name in one if name not in set(other)] for one, other in ((was, now), (now, was)))
    marks = {name: _mark(after, label) for label, name in enumerate(now)}
    found = []
    for name in gone[:SHOWN]:
        mark = _mark(before, was.index(name))
        same = next((other for other in new if mark is not None and marks[other] == mark), None)
        new = [other for other in new if other != same]
        found.append(f"class {name!r} is gone" if same is None else f"class {name!r} is called {same!r}")
    found += [f"class {name!r} is new" for name in new[:SHOWN]]
    if (more := max(len(gone) - SHOWN, 0) + max(len(new) - SHOWN, 0)) > 0:
        found.append(f"and {more} more")
    label = next(label for label in range(max(len(was), len(now))) if was[label : label + 1] != now[label : label + 1])
    names = [repr(names[label]) if label < len(names) else "no class" for names in (was, now)]
    return [*found, f"label {label} was {names[0]} and is {names[1]}"]


def _mark(fingerprint: dict[str, Any], label: int) -> tuple[int, str] | None:
    """What a class is known by when its name is not the same; an older checkpoint knows nothing but names."""
    train = fingerprint["train"]
    return None if train is None else (train["counts"][label], train["digests"][label])


def _of_images(was: dict[str, Any], now: dict[str, Any], classes: list[str]) -> list[str]:
    """Which classes have more, fewer or other images."""
    found = []
    for label, name in enumerate(classes):
        counts = was["counts"][label], now["counts"][label]
        if counts[0] != counts[1]:
            found.append(f"class {name!r} has {counts[1]} images, had {counts[0]}")
        elif was["digests"][label] != now["digests"][label]:
            found.append(f"class {name!r} has other files")
    return found[:SHOWN] + ([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])


def _otherwise(was: dict[str, Any], now: dict[str, Any]) -> str:
    if was["order"] != now["order"]:
        return "images come in another order"
    return "images have other sizes" if was["sizes"] != now["sizes"] else "images hold something else"


class Names:
    """The names and sizes of files at the start of a run, and those that are there now."""

    def __init__(self, kept: Any, **splits: Any) -> None:
        self.kept, self.splits = kept, splits

    def changes(self, part: str) -> list[str]:
        """Which files have moved, are gone, are new or have another size."""
        split = self.splits[part]
        if f"{part}_files" not in self.kept or not hasattr(split, "files"):
            return []
        was, now = self.kept[f"{part}_files"], split.files
        gone, new = np.setdiff1d(was, now), np.setdiff1d(now, was)
        moved = _moved(gone.tolist(), new.tolist())
        found = [f"{_shown(old)} is {_shown(name)} now" for old, name in moved.items()]
        found += [f"{_shown(name)} is gone" for name in gone.tolist() if name not in moved]
        found += [f"{_shown(name)} is new" for name in new.tolist() if name not in set(moved.values())]
        if not found and len(was) == len(now) and (was == now).all():
            found = self._replaced(part)
        return found[:SHOWN] + ([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])

    def _replaced(self, part: str) -> list[str]:
        """Which of the files that were looked at have another size, or begin otherwise."""
        split, found = self.splits[part], {}
        for what, seen, places, said in (
            ("sizes", sizes_of(split), looked_at(len(split)), "has {1} bytes, had {0}"),
            ("contents", contents_of(split), looked_at(len(split), LOOKED_INTO), "holds something else"),
        ):
            before = self.kept.get(f"{part}_{what}", seen)
            for place, old, now in zip(places.tolist(), before.tolist(), seen.tolist(), strict=False):
                if old != now:
                    found.setdefault(place, f"{_shown(split.files[place])} {said.format(old, now)}")
        return list(found.values())


def _moved(gone: list[bytes], new: list[bytes]) -> dict[bytes, bytes]:
    """Files that have the same name in another folder, where there is one such name only."""
    places: dict[bytes, list[bytes]] = {}
    for name in new:
        places.setdefault(name.rpartition(b"/")[2], []).append(name)
    olds = [name.rpartition(b"/")[2] for name in gone]
    pairs = zip(gone, olds, strict=True)
    return {old: places[name][0] for old, name in pairs if len(places.get(name, ())) == 1 and olds.count(name) == 1}


def _shown(name: bytes) -> str:
    return os.fsdecode(name).encode(errors="replace").decode()


def keep_names(path: Path, **splits: Any) -> None:
    """Writes the names and sizes of the files of a run for `read_names`, once; nothing where there are too many."""
    if path.exists():
        return
    content = {}
    for part, split in splits.items():
        if hasattr(split, "files") and len(split) <= KEPT:
            content[f"{part}_files"] = split.files
            content[f"{part}_sizes"], content[f"{part}_contents"] = sizes_of(split), contents_of(split)
    if not content:
        return
    packed = io.BytesIO()
    np.savez_compressed(packed, **content)
    put(path, packed.getvalue())


def read_names(path: Path, **splits: Any) -> Names | None:
    """What `keep_names` wrote, beside the splits as they are; `None` where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Names({name: file[name] for name in file.files}, **splits)
    except (OSError, ValueError, KeyError, EOFError):
        return None
