"""What probes that explain single images have in common: images one by one, their maps drawn, the deletion test.

Shapes: B = images, Y X = map over the picture.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from conf.errors import UserError
from conf.looking import Point
from models.probes import Report, Subject
from models.probes.deletion import deletion_test, probabilities
from models.probes.drawing.overlays import enlarged, overlay, sheet
from models.probes.reading.blocks import short
from models.probes.reading.images import Images, first_images
from models.probes.reading.targets import check_target, target_classes

PANELS = 10  # of layers abreast, beside the picture and the map
DRAWN = 32  # pictures, at most


class Explained(NamedTuple):
    """map_BYX: how much each cell counts. before: the same at later layers by their names, from the last on, (B, Y, X)
    each on its own map."""

    map_BYX: Tensor
    before: dict[str, Tensor]

    @classmethod
    def of(cls, maps: dict[str, Tensor]) -> "Explained":
        """The last of these, and those before it."""
        *names, last = maps
        return cls(maps[last], {name: maps[name] for name in names})


class Found(NamedTuple):
    """Images, what explains each, the class that is explained, (B,), and the logits, (B, K)."""

    images: Images
    explained: list[Explained]
    targets: Tensor
    logits: Tensor


def explained_images(
    who: str,
    model: nn.Module,
    data: pl.LightningDataModule,
    count: int,
    explain: Callable[[Tensor, Tensor], Explained],
    target: str | int = "top",
    labelled: bool = True,
) -> Found:
    """The first images, one after another.

    Args:
        who: names the probe.
        model, data: see `models.probes`.
        count: how many.
        explain: `(image (1, C, H, W), class (1,)) -> Explained`.
        target: the class, see `models.probes.reading.targets`.
        labelled: whether the images have labels.

    Raises:
        UserError: a model that generates images, a class that there is not, or an image that cannot be read.
    """
    if getattr(model, "generates", False):
        raise UserError(
            f"{who}: {type(model).__name__} generates images and has no class to explain; give a classifier"
        )
    check_target(who, target, data, labelled)
    images = first_images(data, count, next(model.parameters()).device)
    with torch.no_grad():
        logits_BK = torch.cat([model(image) for image in images.batch.split(1)]).float()
    targets = target_classes(who, target, data, logits_BK, images.labels)
    pairs = zip(images.batch.split(1), targets.split(1), strict=True)
    explained = [explain(*pair) for pair in track(pairs, who, len(targets), transient=True)]
    return Found(images, explained, targets, logits_BK)


def report_of(
    who: str,
    model: nn.Module,
    data: pl.LightningDataModule,
    subject: Subject,
    found: Found,
    deletion: bool = True,
    point: Point | None = None,
) -> Report:
    """A picture of each image, the tables `images` and `map`, and the deletion test; `point` is marked."""
    several = (subject.config.get("run") or {}).get("task") == "multilabel"
    maps = [explained.map_BYX[0].float().cpu() for explained in found.explained]
    test = Report({})
    if deletion:
        test = deletion_test(model, found.images.batch, found.targets, torch.stack(maps), several)
    rows = _rows(found, data, several)
    pictures, captions = {}, {}
    for i, row in enumerate(rows[:DRAWN]):
        name, said = row["image"], f"{row['class']} ({row['probability']:.1%})"
        pictures[name] = _picture(found.images.shown[i], found.explained[i], maps[i], said, point)
        what = f"what counts for {said}" if point is None else "where the marked point comes from"
        captions[name] = f"{name}: {what}, by {who}; the least of each map is left dark."
    table = [
        {"image": row["image"], "row": y, "column": x, "weight": f"{value:.6g}"}
        for row, weights in zip(rows, maps, strict=True)
        for y, line in enumerate(weights.tolist())
        for x, value in enumerate(line)
    ]
    left = [f"pictures: the first {DRAWN} of {len(rows)}"] if len(rows) > DRAWN else []
    height, width = maps[0].shape
    return Report(
        {"images": len(rows), "layers": 1 + len(found.explained[0].before)} | test.figures,
        rows={"images": len(rows), "layers": 1 + len(found.explained[0].before), "map": f"{height} × {width} cells"},
        tables={"images": rows, "map": table} | test.tables,
        pictures=pictures | test.pictures,
        captions=captions | test.captions,
        lines=[*test.lines, *left],
    )


def _rows(found: Found, data: pl.LightningDataModule, several: bool) -> list[dict[str, Any]]:
    names = list(map(str, data.class_names)) + [f"class {i}" for i in range(len(data.class_names), data.num_classes)]
    chances, rows = probabilities(found.logits, several), []
    for i, target in enumerate(found.targets.tolist()):
        row = {"image": found.images.names[i], "class": names[target]}
        row["probability"] = round(chances[i, target].item(), 6)
        if found.images.labels is not None:
            row["label"] = names[found.images.labels[i]]
        rows.append(row)
    return rows


def _picture(shown: Image.Image, explained: Explained, weights_YX: Tensor, said: str, point: Point | None) -> Any:
    """The picture, what is read at layers from the last on, and the map."""
    steps = list(explained.before.items())
    kept = [(f"at {short(name)}", maps_BYX[0]) for name, maps_BYX in steps[:: max(1, -(-len(steps) // PANELS))]]
    drawn = [(overlay(shown, map_YX - map_YX.min(), point=point), word) for word, map_YX in (*kept, (said, weights_YX))]
    return sheet([[(enlarged(shown), "picture"), *drawn]])
