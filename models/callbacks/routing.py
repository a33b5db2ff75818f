"""Mixture of heads during a run: balancing without a loss after every step, and what the routers do in validation.

What mechanisms draw, such as random keys (`attention/transform=random_keys`), is drawn anew after every step, too.

In validation it logs
    routing/active    the share of all heads of all layers that a token uses
    routing/entropy   of the scores of the routed heads, mean over layers: 1 for an undecided router, 0 for a sure one
    routing/margin    between the last chosen logit and the next, mean over layers: where it is tiny, rounding chooses
    routing/load_min, routing/load_max   the share of tokens that use the least and the most used routed head of all
and writes the load of every head to `routing.csv` and `routing.png` in the run's folder. Without routers it does
nothing.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
from torch import nn

from models.attention.drawn import Drawn
from models.attention.head_router import HeadRouter
from models.attention.moh import balance_heads
from models.callbacks.after_step import AfterStep
from models.loggers.weights_and_biases import log_picture
from models.side_outputs import attempt, put, put_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Layer(NamedTuple):
    """What one layer did in the last validation."""

    name: str
    load: list[float]  # of every head, shared ones first: the share of tokens that used it
    shared: int
    entropy: float
    margin: float


class Routing(AfterStep):
    """See the module's docstring. `layers` is the last measurement."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self._folder = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._routers = {n: m for n, m in pl_module.model.named_modules() if isinstance(m, HeadRouter)}
        self._folder = Path(trainer.default_root_dir)

    def update(self, model: nn.Module) -> None:
        balance_heads(model)
        for module in model.modules():
            if isinstance(module, Drawn):
                module.after_step()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for router in self._routers.values():
            router.watch()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.layers = [layer_of(name, router) for name, router in self._routers.items()]
        routed = [layer for layer in self.layers if len(layer.load) > layer.shared]
        if not self.layers:
            return
        heads = [load for layer in self.layers for load in layer.load]
        figures = {"active": sum(heads) / len(heads)}
        if routed:
            figures |= {"entropy": _mean(routed, "entropy"), "margin": _mean(routed, "margin")}
            figures["load_min"] = min(min(layer.load[layer.shared :]) for layer in routed)
            figures["load_max"] = max(max(layer.load[layer.shared :]) for layer in routed)
        pl_module.log_dict({f"routing/{name}": value for name, value in figures.items()}, rank_zero_only=True)
        if trainer.is_global_zero and trainer.state.fn == "fit":
            attempt("routing.csv", write, self._folder / "routing.csv", trainer.global_step, self.layers)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and any(len(layer.load) > layer.shared for layer in self.layers):
            attempt("routing.png", self._draw, trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        log_picture(trainer.loggers, "routing", draw(self._folder / "routing.png", self.layers))


def layer_of(name: str, router: HeadRouter) -> Layer:
    """What a router, which is called so, did since it is watched."""
    seen = router.seen()
    load = [1.0] * router.shared + ([] if seen is None else seen.load)
    entropy, margin = (math.nan, math.nan) if seen is None else (seen.entropy, seen.margin)
    return Layer(name.removesuffix(".router"), load, router.shared, entropy, margin)


def _mean(layers: list[Layer], name: str) -> float:
    return sum(getattr(layer, name) for layer in layers) / len(layers)


def write(path: Path, step: int, layers: list[Layer]) -> None:
    """Adds one row per layer and head to a CSV file; rows of later steps, from before a resume, are dropped."""
    columns, rows = ["step", "layer", "head", "kind", "load", "entropy", "margin"], []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
    for row in rows_of(layers):
        numbers = {"load": f"{row['load']:.4f}", "entropy": f"{row['entropy']:.4f}", "margin": f"{row['margin']:.4g}"}
        rows.append({"step": step, **row, **numbers})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    put(path, text.getvalue())


def rows_of(layers: list[Layer]) -> list[dict[str, Any]]:
    """A row for each layer and head."""
    return [
        {
            "layer": layer.name,
            "head": head,
            "kind": "shared" if head < layer.shared else "routed",
            "load": load,
            "entropy": layer.entropy,
            "margin": layer.margin,
        }
        for layer in layers
        for head, load in enumerate(layer.load)
    ]


def draw(path: Path, layers: list[Layer]) -> Path:
    """Writes `chart`."""
    put_figure(path, chart(layers))
    return path


def chart(layers: list[Layer]) -> Figure:
    """A map of the load: one row per layer, one column per head, shared heads first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = max(len(layer.load) for layer in layers)
    load = [layer.load + [math.nan] * (heads - len(layer.load)) for layer in layers]
    figure = Figure(figsize=(2.5 + 0.3 * heads, 1.2 + 0.24 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(load, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set(title="tokens that use a head", xlabel="head, shared ones first", yticks=range(len(layers)))
    axis.set_yticklabels([layer.name for layer in layers], fontsize=7)
    figure.colorbar(image, ax=axis)
    return figure
