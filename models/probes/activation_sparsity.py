"""How many numbers behind each activation function are zero or nearly so, and which channels never fire.

Source: The Lazy Neuron Phenomenon, Li et al., ICLR 2023, arXiv:2210.06313, section 2.
Shapes: B = batch, N = tokens, C = channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import timm.layers as of_timm
import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.values import number
from data.batch import Batch
from models.layers.activation import SquaredReLU, TopK
from models.layers.mlp import ConvGLU, ConvMlp
from models.probes import Report
from models.probes.drawing.charts import BLUE, ORANGE, canvas
from models.probes.reading.blocks import short
from models.probes.reading.passes import check_images, over_validation

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(SquaredReLU, TopK, of_timm.GELU, of_timm.GELUTanh, of_timm.QuickGELU),
)
FUSED = (ConvMlp, ConvGLU)  # whose activation a convolution computes with itself, unless it is another than GELU
SHARES = {"zero": "exactly 0", "near": "near 0", "negative": "0 or less"}


def activation_sparsity(
    model: nn.Module, data: pl.LightningDataModule, trainer: pl.Trainer, images: int | None = 512, near: float = 0.01
) -> Report:
    """Of each activation function that is a module of its own: shares of its outputs, and its dead channels.

    A channel is dead where it is near zero on every token of every image. Functions that are called without a module,
    as in the kernels of linear attention, are not seen.

    Args:
        model, data, trainer: see `models.probes`.
        images: of the validation data, spread over it; None for all.
        near: numbers count as nearly zero up to here, on both sides.

    Raises:
        UserError: an option, or a model without such a module.
    """
    check_images("activation_sparsity", images)
    number("activation_sparsity", "near", near, fix="set probe.near=0.01")
    places = {name: part for name, part in model.named_modules() if isinstance(part, ACTIVATIONS)}
    if not places:
        raise UserError(
            f"activation_sparsity: {type(model).__name__} has no activation function that is a module; "
            "choose a model whose blocks have an MLP"
        )
    counts = {name: Counts(near) for name in places}

    def look(batch: Batch) -> None:
        with unfused(model), heard(model, places, counts):
            model.forward(batch.images)

    seen = over_validation("activation_sparsity", model, data, trainer, look, images)
    rows = [count.row(name, type(places[name]).__name__) for name, count in counts.items() if count.total]
    figures: dict[str, Any] = {f"{key}/{row['layer']}": row[key] for row in rows for key in SHARES}
    figures |= {f"dead_channels/{row['layer']}": row["dead_channels"] for row in rows}
    lines = [f"of {seen} images; near 0: up to {near:g} on both sides"]
    silent = [name for name, count in counts.items() if not count.total]
    lines += [f"never called: {', '.join(silent)}"] if silent else []
    return Report(
        figures,
        _shown(rows),
        tables={"layers": rows},
        pictures={"layers": chart(rows)},
        captions={"layers": "zeros behind each activation function, and channels that never leave them"},
        lines=lines,
    )


class Counts:
    """What one activation function has given so far; several calls of one module count together."""

    def __init__(self, near: float) -> None:
        self.near, self.total = near, 0
        self.sums = dict.fromkeys(SHARES, 0)
        self.largest_C: Tensor | None = None

    def add(self, y: Tensor, channel: int) -> None:
        """Outputs whose channels stand at this dimension."""
        size = y.abs()
        self.total += y.numel()
        for key, found in (("zero", y == 0), ("near", size <= self.near), ("negative", y <= 0)):
            self.sums[key] += int(found.sum())
        largest_C = size.movedim(channel, -1).flatten(0, -2).amax(0).float()
        self.largest_C = largest_C if self.largest_C is None else torch.maximum(self.largest_C, largest_C)

    def row(self, name: str, kind: str) -> dict[str, Any]:
        """For the table."""
        shares = {key: value / self.total for key, value in self.sums.items()}
        dead = int((self.largest_C <= self.near).sum())
        return {"layer": name, "function": kind, **shares, "dead_channels": dead, "channels": len(self.largest_C)}


@contextmanager
def heard(model: nn.Module, places: dict[str, nn.Module], counts: dict[str, Counts]) -> Iterator[None]:
    """Inside, forward passes count what the activation functions at these places give."""
    handles = []
    for name, count in counts.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        widths = {part.out_features for part in owner.children() if isinstance(part, nn.Linear)}
        handles.append(places[name].register_forward_hook(partial(_count, count, widths)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count(count: Counts, widths: set[int], module: nn.Module, given: Any, y: Tensor) -> None:
    """A map (B, C, H, W) has its channels second, unless it comes from a linear layer beside the function."""
    count.add(y.detach(), 1 if y.ndim == 4 and y.shape[-1] not in widths else -1)


class _Apart(nn.Module):
    """An activation function that no convolution takes into itself, as it is not known to be one."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Inside, MLPs with a convolution call their activation function; the result is the same to rounding."""
    owners = [part for part in model.modules() if isinstance(part, FUSED)]
    functions = [owner.act for owner in owners]
    try:
        for owner in owners:
            owner.act = _Apart(owner.act)
        yield
    finally:
        for owner, function in zip(owners, functions, strict=True):
            owner.act = function


def chart(rows: list[dict[str, Any]]) -> Any:
    """Shares by layer, and below the share of dead channels."""
    figure = canvas(1.6 + max(4.5, min(14.0, 0.3 * len(rows))), 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    places = range(len(rows))
    for key, colour in zip(SHARES, ("0.2", ORANGE, BLUE), strict=True):
        upper.plot(places, [row[key] for row in rows], color=colour, marker="o", markersize=3, label=SHARES[key])
    upper.set(title="behind the activation functions", ylabel="share of all numbers", ylim=(-0.02, 1.02))
    upper.legend(loc="best", fontsize=8)
    lower.bar(places, [row["dead_channels"] / row["channels"] for row in rows], color="0.4")
    lower.set(ylabel="dead channels", ylim=(0, max(0.05, *(row["dead_channels"] / row["channels"] for row in rows))))
    if len(rows) <= 40:
        lower.set_xticks(places, [short(row["layer"]) for row in rows], rotation=90, fontsize=7)
    return figure


def _shown(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {
        row["layer"]: f"{row['zero']:.1%} exactly 0, {row['near']:.1%} near 0, {row['negative']:.1%} 0 or less, "
        f"dead channels {row['dead_channels']} of {row['channels']}"
        for row in rows
    }
