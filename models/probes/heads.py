"""What heads do: how much the model needs each, how it spreads its attention, and how often a routed one is used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import nn
from tqdm import tqdm

from conf.values import whole
from models.attention import Mixer
from models.callbacks.routing import chart, rows_of
from models.probes import Report
from models.probes.drawing.charts import canvas
from models.probes.reading.head_gates import Heads, Spread, measured, spreads
from models.probes.reading.head_loads import Loads, chart_of_classes
from models.probes.reading.images import first_images
from models.probes.reading.layers import chosen_layers
from models.tasks.multilabel import check_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHO = "heads"
COLUMNS = {  # of heads.csv that are drawn, and their titles
    "drop": "top-1 lost without it",
    "gradient": "mean |∂L/∂gate|",
    "entropy": "entropy of its rows, nats",
    "distance": "distance, pixels",
}


def heads(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    layers: Any = "all",
    images: int = 4,
    limit: int = 500,
) -> Report:
    """Top-1 without each head, the gradient of its gate, entropy and distance of its attention, its load if routed.

    Args:
        model, data, trainer: see `models.probes`.
        layers: whose heads are weighed; see `models.probes.reading.layers.chosen_layers`.
        images: that entropy and distance are the means of.
        limit: images of validation, spread over it, that accuracy, gradient and load are measured on.

    Raises:
        UserError: an option that has no meaning, a model that names no classes, or one without heads to leave out.
    """
    whole("probe", "limit", limit, fix="set probe.limit=500")
    whole("probe", "images", images, fix="set probe.images=4")
    mixers = chosen_layers(WHO, model, layers, gateable, "heads to be left out", "a model with e.g. softmax")
    check_labels(data.source.val.labels, several=False)
    device, loads = trainer.strategy.root_device, Loads(model, data.num_classes)
    found = _measured(model, mixers, data, limit, loads, device)
    spread = spreads(model, mixers, first_images(data, images, device).batch)
    table = table_of(mixers, found, spread, loads)
    names = [
        *map(str, data.class_names),
        *(f"class {label}" for label in range(len(data.class_names), data.num_classes)),
    ]
    pictures, captions = _pictures(table, loads, names)
    return Report(
        {"top1": found.top1, "images": found.images} | _figures(table),
        rows={"top-1, all heads": f"{found.top1:.2%}"} | _rows(table),
        tables={"heads": table} | ({"loads": rows} if (rows := _loads_by_class(loads, names)) else {}),
        pictures=pictures,
        captions=captions,
        lines=_lines(found.images, len(data.source.val), mixers, spread),
    )


def gateable(mixer: Mixer) -> bool:
    """Whether its heads can be weighted."""
    return mixer.accepts.gates


def table_of(mixers: dict[str, Mixer], found: Heads, spread: dict[str, Spread], loads: Loads) -> list[dict[str, Any]]:
    """A row for each layer and head; None where there is nothing to say."""
    routed = {(row["layer"], row["head"]): row for row in rows_of(loads.layers())}
    rows = []
    for name, mixer in mixers.items():
        for head in range(mixer.site.num_heads):
            load = routed.get((name, head), {})
            of_head = (values[head] for values in spread[name]) if name in spread else (None, None)
            rows.append(
                {"layer": name, "head": head, "kind": load.get("kind"), "load": load.get("load")}
                | {"top1_without": found.without[name][head], "drop": found.top1 - found.without[name][head]}
                | {"gradient": found.gradient[name][head]}
                | dict(zip(("entropy", "distance"), of_head, strict=True))
            )
    return rows


def _measured(
    model: nn.Module,
    mixers: dict[str, Mixer],
    data: pl.LightningDataModule,
    limit: int,
    loads: Loads,
    device: torch.device,
) -> Heads:
    """On images of validation, spread over it; a bar says how far that is."""
    chosen = data.spread(limit)
    parts = [chosen[first : first + data.batch_size] for first in range(0, len(chosen), data.batch_size)]
    batches = map(data.evaluated, parts)
    on_device = ((batch.images.to(device), batch.labels.to(device)) for batch in batches)
    passes = len(parts) * sum(mixer.site.num_heads for mixer in mixers.values())
    with tqdm(total=passes, desc="passes without a head", leave=False, disable=None) as bar:
        return measured(model, mixers, on_device, loads, bar.update)


def _figures(table: list[dict[str, Any]]) -> dict[str, float]:
    return {
        f"{row['layer']}/{row['head']}/{name}": row[name]
        for row in table
        for name in (*COLUMNS, "load")
        if row[name] is not None
    }


def _rows(table: list[dict[str, Any]]) -> dict[str, str]:
    """The heads that the model needs most and least."""
    order = sorted(table, key=lambda row: (row["drop"], row["gradient"]))
    told = {"needed most": order[-1], "needed least": order[0]}
    return {
        word: f"{row['layer']} head {row['head']}: {row['top1_without']:.2%} without it" for word, row in told.items()
    }


def _loads_by_class(loads: Loads, names: list[str]) -> list[dict[str, Any]]:
    """A row for each layer and routed head, a column for each class that there is."""
    found = loads.of_classes()
    return [
        {"layer": layer.name, "head": head}
        | {names[label]: load for label, load in enumerate(found[layer.name][:, head].tolist()) if not math.isnan(load)}
        for layer in loads.layers()
        for head in range(layer.shared, len(layer.load))
    ]


def _pictures(table: list[dict[str, Any]], loads: Loads, names: list[str]) -> tuple[dict, dict]:
    pictures: dict[str, Any] = {"heads": chart_of_heads(table)}
    captions = {"heads": "Rows are layers, columns heads: what the model loses without one, and how it attends."}
    layers = loads.layers()
    if any(len(layer.load) > layer.shared for layer in layers):
        pictures |= {"loads": chart(layers), "loads-by-class": chart_of_classes(loads.of_classes(), layers, names)}
        captions["loads"] = "How often tokens use each head, shared ones first."
        captions["loads-by-class"] = "The same of the routed heads, for the images of each class."
    return pictures, captions


def chart_of_heads(table: list[dict[str, Any]]) -> Figure:
    """A map for each of `COLUMNS` that has values: rows are layers, columns heads."""
    layers = list(dict.fromkeys(row["layer"] for row in table))
    most = 1 + max(row["head"] for row in table)
    shown = [name for name in COLUMNS if any(row[name] is not None for row in table)]
    largest = max(abs(row["drop"]) for row in table) or 1.0
    figure = canvas(2.0 + len(shown) * (1.2 + 0.22 * most), 1.4 + 0.24 * len(layers))
    for number, axis in enumerate(figure.subplots(1, len(shown), squeeze=False)[0]):
        values = [[math.nan] * most for _ in layers]
        for row in table:
            value = row[shown[number]]
            values[layers.index(row["layer"])][row["head"]] = math.nan if value is None else value
        colours = {"cmap": "coolwarm", "vmin": -largest, "vmax": largest} if shown[number] == "drop" else {}
        image = axis.imshow(values, aspect="auto", interpolation="nearest", **colours)
        axis.set_title(COLUMNS[shown[number]], fontsize=8)
        axis.set(xlabel="head", yticks=range(len(layers)))
        axis.set_yticklabels([] if number else layers, fontsize=7)
        figure.colorbar(image, ax=axis)
    return figure


def _lines(images: int, total: int, mixers: dict[str, Mixer], spread: dict[str, Spread]) -> list[str]:
    lines = [f"accuracy, gradients and loads of {images} of {total} validation images"]
    blank = [name for name in mixers if name not in spread]
    return lines + ([f"without weights of tokens on tokens, hence no entropy: {', '.join(blank)}"] if blank else [])
