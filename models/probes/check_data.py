"""Looks at every image of a data set: what cannot be read, what is there twice, how many there are of each class.

Copies are found by the content of the files, or by the pixels where a source has no files.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from rich.progress import Progress

from conf.errors import UserError
from data.sources.decode import UnreadableImage
from data.sources.form import RGB, Form
from data.sources.formats import image_of
from models.probes import Report
from models.probes.drawing.charts import chart_of_classes, chart_of_sizes

AHEAD = 64  # images that are read before they are looked at


class Seen(NamedTuple):
    """An image: its split and name, label, size and mode as stored, the hash of its content, or what is wrong."""

    split: str
    name: str
    label: Any
    size: tuple[int, int] | None = None
    mode: str | None = None
    digest: str | None = None
    trouble: str | None = None


def check_data(data: pl.LightningDataModule, threads: int = 4) -> Report:
    """What is in the training and the validation split, whatever is wrong with it.

    Args:
        data: the images.
        threads: that read files.
    """
    splits = _splits(data)
    seen = list(_read(splits, threads, data.form))
    classes, names = list(map(str, data.class_names)), list(splits)
    readable = [image for image in seen if image.trouble is None]
    copies = copies_of(readable)
    counts = counts_of(seen, classes, names)
    figures = _figures(seen, copies, names)
    return Report(
        figures,
        rows=_rows(figures, readable),
        tables={
            "classes": [{"class": name, **{n: int(counts[n][i]) for n in names}} for i, name in enumerate(classes)],
            "unreadable": [{"split": i.split, "file": i.name, "reason": i.trouble} for i in seen if i.trouble],
            "copies": [_row(first, other, classes) for first, other in copies],
            "sizes": _sizes(readable),
        },
        pictures={"classes": chart_of_classes(classes, counts), "sizes": chart_of_sizes([i.size for i in readable])},
        lines=_lines(seen, copies, counts, classes),
    )


def _splits(data: pl.LightningDataModule) -> dict[str, Any]:
    """Those that there are: an evaluation set has nothing to train on."""
    try:
        return {"train": data.source.train, "val": data.source.val}
    except (UserError, OSError):
        return {"val": data.source.val}


def _read(splits: dict[str, Any], threads: int, form: Form) -> Iterator[Seen]:
    """All images in order, by a few threads, with a bar that says how far it is."""
    places = [(name, split, index) for name, split in splits.items() for index in range(len(split))]
    with Progress(transient=True) as progress, ThreadPoolExecutor(max(1, int(threads))) as pool:
        bar = progress.add_task("reading images", total=len(places))
        for start in range(0, len(places), AHEAD):
            for image in pool.map(lambda place: look_at(*place, form), places[start : start + AHEAD]):
                progress.advance(bar)
                yield image


def look_at(name: str, split: Any, index: int, form: Form = RGB) -> Seen:
    """One image, decoded in full."""
    file = split.path(index) if hasattr(split, "path") else None
    called = split.relative_path(index) if hasattr(split, "relative_path") else str(index)
    place = Seen(name, called, split.labels[index])
    try:
        pixels = split.read(index, form) if hasattr(split, "read") and not form.plain else split[index][0]
        stored = (pixels.size, pixels.mode) if isinstance(pixels, Image.Image) else (pixels.shape[1::-1], "array")
        if file is None:
            digest = _digest(np.ascontiguousarray(pixels).tobytes())
            return place._replace(size=stored[0], mode=stored[1], digest=digest)
        content = Path(file).read_bytes()
        if not str(file).endswith(".npy"):
            with image_of(file) as image:
                stored = image.size, image.mode
        return place._replace(size=stored[0], mode=stored[1], digest=_digest(content))
    except (UnreadableImage, OSError) as error:
        return place._replace(trouble=str(error).partition(" (")[2].rpartition("); ")[0] or str(error))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def copies_of(seen: Iterable[Seen]) -> list[tuple[Seen, Seen]]:
    """Every image whose content was seen before, with the first that had it; training comes before validation."""
    first: dict[str, Seen] = {}
    return [(first[image.digest], image) for image in seen if first.setdefault(image.digest, image) is not image]


def counts_of(seen: Iterable[Seen], classes: list[str], names: list[str]) -> dict[str, np.ndarray]:
    """Images per class (K,) of each split; one with several labels counts for all."""
    counts = {name: np.zeros(len(classes), int) for name in names}
    for image in seen:
        labels = np.flatnonzero(image.label) if np.ndim(image.label) else [image.label]
        for label in labels:
            if 0 <= label < len(classes):
                counts[image.split][label] += 1
    return counts


def _figures(seen: list[Seen], copies: list[tuple[Seen, Seen]], names: list[str]) -> dict[str, Any]:
    between = [pair for pair in copies if pair[0].split != pair[1].split]
    other = [pair for pair in copies if not _same(pair[0].label, pair[1].label)]
    return {
        **{f"images_{name}": sum(image.split == name for image in seen) for name in names},
        "unreadable": sum(image.trouble is not None for image in seen),
        "copies_within": len(copies) - len(between),
        "copies_between": len(between),
        "copies_of_other_classes": len(other),
    }


def _rows(figures: dict[str, Any], readable: list[Seen]) -> dict[str, Any]:
    words = {
        "images_train": "images for training",
        "images_val": "images for validation",
        "unreadable": "unreadable",
        "copies_within": "copies within a split",
        "copies_between": "copies of training images in validation",
        "copies_of_other_classes": "copies with another label",
    }
    rows = {word: figures[name] for name, word in words.items() if name in figures}
    if readable:
        sizes = np.array([image.size for image in readable])
        low, middle, high = (np.quantile(sizes, share, axis=0).astype(int) for share in (0, 0.5, 1))
        rows["width x height, median"] = f"{middle[0]} x {middle[1]}"
        rows["from, to"] = f"{low[0]} x {low[1]}, {high[0]} x {high[1]}"
        modes = Counter(image.mode for image in readable)
        rows["modes"] = ", ".join(f"{mode} {count}" for mode, count in modes.most_common())
    return rows


def _sizes(readable: list[Seen]) -> list[dict[str, Any]]:
    counted = Counter((*image.size, image.mode) for image in readable)
    return [{"width": w, "height": h, "mode": mode, "images": n} for (w, h, mode), n in counted.most_common()]


def _row(first: Seen, other: Seen, classes: list[str]) -> dict[str, Any]:
    return {
        "split": other.split,
        "file": other.name,
        "class": _class(other.label, classes),
        "same_as": first.name,
        "in": first.split,
        "of_class": _class(first.label, classes),
    }


def _class(label: Any, classes: list[str]) -> str:
    return ";".join(classes[i] for i in np.flatnonzero(label)) if np.ndim(label) else classes[int(label)]


def _same(label: Any, other: Any) -> bool:
    return bool(np.array_equal(label, other))


def _lines(
    seen: list[Seen], copies: list[tuple[Seen, Seen]], counts: dict[str, np.ndarray], classes: list[str]
) -> list[str]:
    found = []
    broken = [image for image in seen if image.trouble]
    if broken:
        first = broken[0]
        found.append(f"unreadable: {len(broken)}, the first is {first.split}/{first.name}: {first.trouble}")
    between = [pair for pair in copies if pair[0].split != pair[1].split]
    if between:
        first, other = between[0]
        found.append(
            f"copies of training images in validation, which make accuracy too good: {len(between)}, the first is "
            f"{other.name}, the same as {first.name}"
        )
    if wrong := [pair for pair in copies if not _same(pair[0].label, pair[1].label)]:
        first, other = wrong[0]
        found.append(f"copies with another label: {len(wrong)}, the first is {other.name}, the same as {first.name}")
    for name, count in counts.items():
        if empty := [classes[i] for i in np.flatnonzero(count == 0)]:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            found.append(f"classes without an image in {name}: {len(empty)}, {', '.join(empty[:5])}{more}")
    if "train" in counts and (present := counts["train"][counts["train"] > 0]).size > 1:
        ratio = present.max() / present.min()
        if ratio >= 5:
            found.append(
                f"the largest class has {ratio:.0f} times the training images of the smallest; "
                "see task.class_weights=auto and data.balanced=true"
            )
    return found or ["nothing is wrong with these images"]
