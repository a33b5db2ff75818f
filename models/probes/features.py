"""What a model makes of images: its maps in colours, its features on a plane, and its vectors in files.

Source: maps in the colours of their main components: DINOv2, Oquab et al., TMLR 2024, arXiv:2304.07193, section 7.4;
t-SNE: van der Maaten & Hinton, JMLR 2008.
Shapes: B = images, C = channels, H W = map; F = features that the head is given.
"""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.values import choice, flag, whole
from data.batch import Batch
from models.attention.recording import recorded
from models.probes import Report
from models.probes.drawing.charts import canvas
from models.probes.drawing.overlays import enlarged, sheet
from models.probes.reading.images import Images, first_images
from models.probes.reading.layers import chosen_layers
from models.probes.reading.passes import over_validation
from models.probes.reading.principal import colours, components, painted
from models.probes.reading.queries_keys import exported, projects
from models.probes.reading.stage_maps import check_stage_maps, stage_maps

LEAST = 5  # images of which t-SNE makes a plane
NAMED = 20  # classes up to which the legend names them


def features(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    input: Any = None,
    images: int = 4,
    maps: str = "all",
    points: int = 500,
    export: bool = False,
    layers: Any = "all",
) -> Report:
    """A picture for each image, with the maps of the stages in the colours of their three main components; a t-SNE of
    what the head is given of validation images.

    Args:
        model, data, trainer, input: see `models.probes`.
        images: that are drawn, and exported.
        maps: "all" stages, or the "last".
        points: images for validation of the t-SNE, spread over the data; 0 for none, as for images of the user, which
            have no classes.
        export: tokens, queries and keys of the layers too, as `vectors.safetensors` and `vectors.csv`.
        layers: that are exported, see `models.probes.reading.layers.chosen_layers`.

    Raises:
        UserError: an option, a model without maps, or a layer without queries and keys.
    """
    choice("features", "maps", maps, ("all", "last"), fix="set probe.maps=all")
    whole("features", "points", points, 0, fix="set probe.points=500, or 0 for none")
    flag("features", "export", export, fix="set probe.export=true")
    check_stage_maps("features", model)
    if points and data.source.val.labels.ndim > 1:
        raise UserError("features: t-SNE colours one class per image, got images with several; set probe.points=0")
    what = "pair of queries and keys"
    mixers = chosen_layers("features", model, layers, projects, what) if export else {}
    seen = first_images(data, images, trainer.strategy.root_device)
    with torch.no_grad(), trainer.precision_plugin.forward_context(), recorded(model) as calls:
        found = {name: stage.float() for name, stage in stage_maps(model, seen.batch).items()}
    found = found if maps == "all" else dict([list(found.items())[-1]])
    report = _of_maps(found, seen)
    if export:
        vectors = exported(mixers, calls, seen)
        report.tables["vectors"], report.tensors["vectors"] = vectors.index, vectors.tensors
    if points and seen.labels is None:
        report.lines.append("no t-SNE: images of the user have no classes")
    elif points:
        _on_a_plane(report, model, data, trainer, points)
    return report


def _of_maps(found: dict[str, Tensor], seen: Images) -> Report:
    """The colours of every map and the variance that they show."""
    parts = {name: components(stage) for name, stage in found.items()}
    tinted = {name: colours(part.coordinates) for name, part in parts.items()}
    rows = [
        {"map": name, "channels": found[name].shape[1], "height": found[name].shape[2], "width": found[name].shape[3]}
        | dict(zip(("red", "green", "blue"), part.shares, strict=True))
        for name, part in parts.items()
    ]
    pictures = {
        name: sheet(
            [[(enlarged(seen.shown[i]), name), *((painted(seen.shown[i], t[i]), k) for k, t in tinted.items())]]
        )
        for i, name in enumerate(seen.names)
    }
    said = "the three main components of its tokens as red, green and blue, the same for all images"
    return Report(
        {f"{row['map']}/{key}": row[key] for row in rows for key in ("red", "green", "blue")},
        {row["map"]: f"{row['red'] + row['green'] + row['blue']:.1%} of the variance in three colours" for row in rows},
        tables={"maps": rows},
        pictures=pictures,
        captions={name: f"{name}: each stage in {said}" for name in pictures},
    )


def _on_a_plane(
    report: Report, model: nn.Module, data: pl.LightningDataModule, trainer: pl.Trainer, points: int
) -> None:
    """Adds the t-SNE to a report."""
    features_NF, labels, indices = pooled(model, data, trainer, points)
    if len(labels) < LEAST:
        report.lines.append(f"no t-SNE: {len(labels)} images make no plane, {LEAST} do")
        return
    plane = plane_of(features_NF)
    names = list(map(str, data.class_names))
    report.figures["nearest_of_class"] = nearest_of_class(features_NF, labels)
    report.rows["nearest of the same class"] = f"{report.figures['nearest_of_class']:.2%}"
    report.tables["plane"] = [
        {"image": int(index), "class": names[label], "x": float(x), "y": float(y)}
        for index, label, (x, y) in zip(indices, labels, plane, strict=True)
    ]
    report.pictures["plane"] = chart(plane, labels, names)
    report.captions["plane"] = f"t-SNE of what the head is given of {len(labels)} images for validation, by class"


def pooled(
    model: nn.Module, data: pl.LightningDataModule, trainer: pl.Trainer, points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the head is given (N, F), labels (N,) and positions in the data (N,)."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else model.head
    kept: list[tuple[Tensor, ...]] = []
    given: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))

    def look(batch: Batch) -> None:
        given.clear()
        model.forward(batch.images)
        kept.append((given[-1].flatten(1).float().cpu(), batch.labels.cpu(), batch.indices.cpu()))

    try:
        over_validation("features", model, data, trainer, look, points)
    finally:
        handle.remove()
    return tuple(torch.cat(part).numpy() for part in zip(*kept, strict=True))


def plane_of(features_NF: np.ndarray) -> np.ndarray:
    """t-SNE (N, 2), the same in every run."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features_NF) - 1) / 3)
    start = "pca" if features_NF.shape[1] > 1 else "random"
    return TSNE(perplexity=perplexity, init=start, random_state=0).fit_transform(features_NF)


def nearest_of_class(features_NF: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose nearest other one has their class."""
    x = torch.from_numpy(features_NF).double()
    distances = torch.cdist(x, x).fill_diagonal_(float("inf"))
    return float((labels[distances.argmin(1).numpy()] == labels).mean())


def chart(plane: np.ndarray, labels: np.ndarray, names: list[str]) -> Any:
    """A dot for each image, in the colour of its class."""
    from matplotlib import colormaps

    present = np.unique(labels)
    palette = colormaps["tab10" if len(present) <= 10 else "tab20" if len(present) <= 20 else "gist_rainbow"]
    figure = canvas(6.2, 5.0)
    axis = figure.subplots()
    for number, label in enumerate(present):
        dots = plane[labels == label]
        colour = palette(number if len(present) <= 20 else number / len(present))
        axis.scatter(dots[:, 0], dots[:, 1], s=9, color=colour, label=names[label], linewidths=0)
    axis.set(title="t-SNE of the features", xticks=[], yticks=[])
    axis.set_aspect("equal", adjustable="datalim")
    if len(present) <= NAMED:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=2)
    return figure
