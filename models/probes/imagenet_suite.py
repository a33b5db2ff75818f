"""A model of ImageNet's classes on its relatives: ReaL, V2, A, R, Sketch and C, each with the classes that it has.

Source: ReaL, Beyer et al., arXiv:2006.07159; V2, Recht et al., arXiv:1902.10811; A, Hendrycks et al., arXiv:1907.07174;
R, Hendrycks et al., arXiv:2006.16241; Sketch, Wang et al., arXiv:1905.13549; C and its mean corruption error (errors
over severities, divided by AlexNet's, averaged), Hendrycks and Dietterich, arXiv:1903.12261. Classes of A and R and the
labels of ReaL are those that timm carries. On 200 classes the largest of their logits alone counts.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import timm
import torch
from torch import Tensor, nn

from conf.errors import UserError
from data.sources.imagefolder import FolderSplit
from models.probes import Report, Subject

INFO = Path(timm.__file__).parent / "data" / "_info"
CLASSES = 1000
# errors of AlexNet in percent, averaged over the severities: what the errors of a model are divided by
ALEXNET = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
SEVERITIES = range(1, 6)
SUBSETS = {"A": "imagenet_a", "R": "imagenet_r"}
FOLDERS = {
    "V2": "imagenetv2-matched-frequency-format-val",
    "A": "imagenet-a",
    "R": "imagenet-r",
    "Sketch": "sketch",
    "C": "imagenet-c",
}


class Said(NamedTuple):
    """The five best labels of every image (N, ≤ 5) and the right ones (N,), in the order of the data."""

    best_NK: Tensor
    labels_N: Tensor

    def share(self, among: int) -> float:
        """Of images whose label is among the best so many."""
        return (self.best_NK[:, :among] == self.labels_N[:, None]).any(1).double().mean().item()


class Seen:
    """A source whose validation images are those of a split."""

    embedded = False

    def __init__(self, split: Any, classes: Sequence[str]) -> None:
        self.classes, self.train, self.val = list(classes), split, split


def imagenet_suite(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    subject: Subject,
    root: str | None = None,
    folders: dict[str, str] | None = None,
    corruptions: bool = True,
) -> Report:
    """Top-1 and top-5 on every set that is there; those that are not are named.

    Args:
        model, data, trainer, subject: see `models.probes`; the data are ImageNet's validation images.
        root: the folder that holds the other sets; None for the one that `data.root` lies in.
        folders: of the sets below it, where they are called otherwise than in `FOLDERS`.
        corruptions: measure C too, which has 75 times as many images.

    Raises:
        UserError: the model has other classes than ImageNet, or a set has.
    """
    if data.num_classes != CLASSES:
        raise UserError(
            f"imagenet_suite: a model of {CLASSES} classes is needed, got {data.num_classes}; give data=imagenet1k"
        )
    if trainer.world_size > 1:
        raise UserError(f"imagenet_suite: one device is needed, got {trainer.world_size}; set trainer.devices=1")
    unknown = set(folders or {}) - set(FOLDERS)
    if unknown:
        raise UserError(f"imagenet_suite: there is no set {min(unknown)!r}; folders has {', '.join(FOLDERS)}")
    names = _names(subject.classes, data.class_names)
    place = Path(root).expanduser() if root is not None else Path(data.root or ".").expanduser().resolve().parent
    places = {name: place / folder for name, folder in (FOLDERS | (folders or {})).items()}
    run = Runs(model, data, trainer)
    said = run(data.source.val)
    rows, lines = [_row("ImageNet-1k", said)], []
    real = real_labels(data.source.val, said)
    rows += [real] if real else []
    lines += [] if real else ["ReaL: left out, its labels are of files named ILSVRC2012_val_00000001 and so on"]
    for name in ("V2", "A", "R", "Sketch"):
        if places[name].is_dir():
            rows.append(_row(name, run(split_of(places[name], names), _kept(name, names))))
    absent = [name for name, folder in places.items() if not folder.is_dir() and (corruptions or name != "C")]
    lines += [f"{name}: not measured, there is no folder {places[name]}" for name in absent]
    figures = {f"{row['set']}/{key}": row[key] for row in rows for key in ("top1", "top5") if row[key] is not None}
    tables = {"sets": rows}
    shown = {row["set"]: f"{row['top1']:.2%}" + f", {row['images']} images" for row in rows}
    if corruptions and "C" not in absent:
        tables["corruptions"] = list(_corruptions(places["C"], names, run))
        figures["C/mce"], told = mean_corruption_error(tables["corruptions"])
        shown["C, mCE"] = f"{figures['C/mce']:.2%}"
        lines += told
    count = len(data.source.val)
    return Report(figures, shown, tables=tables, lines=lines, score=rows[0]["top1"], measured=(count, count))


class Runs:
    """`run(split, kept) -> Said`: the model on the images of a split, prepared as the data prepares its own."""

    def __init__(self, model: nn.Module, data: pl.LightningDataModule, trainer: pl.Trainer) -> None:
        self.model, self.data, self.trainer = model, data, trainer

    def __call__(self, split: Any, kept: Sequence[int] | None = None) -> Said:
        seen = copy.copy(self.data)
        seen.source = Seen(split, self.data.class_names)
        listener = _Listener(self.model, kept)
        self.trainer.validate(listener, seen, verbose=False)
        order = torch.cat(listener.indices).argsort()
        return Said(torch.cat(listener.best)[order], torch.cat(listener.labels)[order])


class _Listener(pl.LightningModule):
    """Keeps the best labels of every image; those of `kept` alone, where only these can be right."""

    def __init__(self, model: nn.Module, kept: Sequence[int] | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("kept", None if kept is None else torch.tensor(kept), persistent=False)
        self.best: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.indices: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits_BK = self.model(batch.images).float()
        if self.kept is not None:
            logits_BK = logits_BK[:, self.kept]
        best_BK = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
        self.best.append((best_BK if self.kept is None else self.kept[best_BK]).cpu())
        self.labels.append(batch.labels.cpu())
        self.indices.append(batch.indices.cpu())


def split_of(folder: Path, names: Sequence[str]) -> FolderSplit:
    """The images of a set, whose folders are called by WordNet's numbers, or 0 to 999 in the usual order.

    Raises:
        UserError: a folder is no class of ImageNet, or there is none.
    """
    there = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    usual = _lines("imagenet_synsets.txt")
    number = {wnid: str(index) for index, wnid in enumerate(usual)}
    called = [number[name] for name in names] if there and all(name.isdigit() for name in there) else list(names)
    if not there or there - set(called):
        wrong = min(there - set(called), default="nothing")
        raise UserError(
            f"imagenet_suite: folders must be classes of ImageNet, got {wrong} in {folder}; give probe.folders the "
            "one that holds n01440764 and its like"
        )
    return FolderSplit(str(folder), called)


def real_labels(split: Any, said: Said) -> dict[str, Any] | None:
    """The row of ReaL, whose images have several right labels or none; None where the files are called otherwise."""
    path = getattr(split, "relative_path", str)
    numbers = [re.search(r"ILSVRC2012_val_(\d{8})", path(index)) for index in range(len(split))]
    if not all(numbers):
        return None
    labels = json.loads((INFO / "imagenet_real_labels.json").read_text())
    right = [set(labels[int(number[1]) - 1]) for number in numbers]
    judged = [(best, good) for best, good in zip(said.best_NK.tolist(), right, strict=True) if good]
    hits = {among: sum(bool(good & set(best[:among])) for best, good in judged) for among in (1, 5)}
    count = max(len(judged), 1)
    return {"set": "ReaL", "top1": hits[1] / count, "top5": hits[5] / count, "images": len(judged), "classes": CLASSES}


def mean_corruption_error(rows: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """The mean over corruptions of errors divided by AlexNet's, and what is missing for the published figure."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row["corruption"], []).append(1 - row["top1"])
    shares = [sum(found) / len(found) / (ALEXNET[name] / 100) for name, found in errors.items()]
    lines = (
        [f"C: without {', '.join(missing)}"] if (missing := [name for name in ALEXNET if name not in errors]) else []
    )
    lines += [f"C: {name} has {len(found)} of 5 severities" for name, found in errors.items() if len(found) < 5]
    return sum(shares) / len(shares), lines


def _corruptions(folder: Path, names: Sequence[str], run: Runs) -> Iterator[dict[str, Any]]:
    """A row for each corruption and severity, below `<root>/` or `<root>/<group>/`."""
    found = {path.name: path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.name in ALEXNET}
    if not found:
        raise UserError(f"imagenet_suite: no corruption such as gaussian_noise, got {folder}; mend probe.folders.C")
    for name, place in found.items():
        for severity in SEVERITIES:
            if (place / str(severity)).is_dir():
                row = _row(name, run(split_of(place / str(severity), names)))
                yield {"corruption": name, "severity": severity, "top1": row["top1"], "images": row["images"]}


def _row(name: str, said: Said) -> dict[str, Any]:
    classes = len(said.labels_N.unique())
    return {
        "set": name,
        "top1": said.share(1),
        "top5": said.share(5),
        "images": len(said.labels_N),
        "classes": classes,
    }


def _names(*known: Sequence[str] | None) -> list[str]:
    """WordNet's numbers by label: of training, of the data, or in the usual order."""
    for names in known:
        if names and len(names) == CLASSES and all(re.fullmatch(r"n\d{8}", name) for name in names):
            return list(names)
    return _lines("imagenet_synsets.txt")


def _kept(name: str, names: Sequence[str]) -> list[int] | None:
    """The labels of a set of 200 classes; None for all."""
    if name not in SUBSETS:
        return None
    label = {wnid: index for index, wnid in enumerate(names)}
    return [label[wnid] for wnid in _lines(f"{SUBSETS[name]}_synsets.txt")]


def _lines(file: str) -> list[str]:
    return (INFO / file).read_text().split()
