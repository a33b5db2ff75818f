"""What the classifier of a model makes of the tokens of each layer.

Source: Analyzing Vision Transformers for Image Classification in Class Embedding Space, Vilas et al., NeurIPS 2023,
arXiv:2310.18969, equations 3 and 4.
Shapes: B = batch, N = tokens, C = channels, K = classes.
"""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from data.batch import Batch
from models.backbones.base import Backbone
from models.layers.downsample import reduced
from models.layers.grid import Grid
from models.probes import Report
from models.probes.drawing.charts import BLUE, ORANGE, canvas
from models.probes.reading.blocks import short
from models.probes.reading.passes import check_images, over_validation

PART = 4096  # tokens that are classified at once


class Place(NamedTuple):
    """A block whose tokens the head can read."""

    name: str
    block: nn.Module


def logit_lens(
    model: nn.Module, data: pl.LightningDataModule, trainer: pl.Trainer, images: int | None = None, tokens: bool = True
) -> Report:
    """Top-1 and log-loss of head(pool(norm(x))) for the tokens x behind each block; those of the last are the model's.

    The class identifiability of a token is 1 where the right class comes first in head(norm(token)), 0 where it comes
    last. Of a model whose stages have different channels the blocks of the last stage are looked at.

    Args:
        model, data, trainer: see `models.probes`.
        images: of the validation data, spread over it; None for all.
        tokens: class identifiability too.

    Raises:
        UserError: an option, a model without a head for its tokens, or images with several labels.
    """
    check_images("logit_lens", images)
    places, left_out = _places(model)
    _check(model, data)
    lens = Lens(model, places, tokens)
    count = over_validation("logit_lens", model, data, trainer, lens.look, images)
    rows = lens.rows(count)
    figures = {f"{name}/{row['layer']}": row[name] for name in lens.measured for row in rows}
    said = [f"of {count} images"]
    said += [f"not looked at, as the head reads {model.channels[-1]} channels: {left_out}"] if left_out else []
    return Report(
        figures,
        _shown(rows),
        tables={"layers": rows},
        pictures={"layers": chart(rows)},
        captions={"layers": "what the head of the model makes of the tokens behind each block"},
        lines=said,
    )


class Lens:
    """Sums over images, by layer."""

    def __init__(self, model: Backbone, places: list[Place], tokens: bool) -> None:
        self.model, self.places, self.tokens = model, places, tokens
        self.sums: dict[str, dict[str, float]] = {place.name: {} for place in places}

    @property
    def measured(self) -> list[str]:
        """What there is of each layer."""
        return list(next(iter(self.sums.values())))

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Means over so many images."""
        return [
            {"layer": name} | {key: value / count for key, value in sums.items()} for name, sums in self.sums.items()
        ]

    def look(self, batch: Batch) -> None:
        """Counts a batch."""
        for name, (x_BNC, grid) in self._tokens(batch.images).items():
            logits_BK = self.model.classify(x_BNC, grid).float()
            self._add(name, "top1", (logits_BK.argmax(1) == batch.labels).sum())
            self._add(name, "loss", F.cross_entropy(logits_BK, batch.labels, reduction="sum"))
            if self.tokens:
                found_BN = self._identifiability(x_BNC, batch.labels)
                self._add(name, "identifiability", found_BN[:, grid.prefix :].mean(1).sum())
                if grid.prefix:
                    self._add(name, "identifiability_class_token", found_BN[:, 0].sum())

    def _tokens(self, images: Tensor) -> dict[str, tuple[Tensor, Grid]]:
        """Of each layer, finished as those that the model pools: normalised, behind class attention where there is."""
        found: dict[str, tuple[Tensor, Grid]] = {}
        of_stage = getattr(self.model.stages[-1], "norm", nn.Identity())  # PVT v2's stages end with one

        def note(name: str) -> Any:
            def hook(block: nn.Module, given: tuple, output: tuple) -> None:
                grid = reduced(given[1], getattr(block, "stride", 1))
                found[name] = self.model.finished(of_stage(output[0]), grid)

            return hook

        handles = [place.block.register_forward_hook(note(place.name)) for place in self.places]
        try:
            self.model.forward_tokens(images)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _identifiability(self, x_BNC: Tensor, labels_B: Tensor) -> Tensor:
        """(B, N): 1 − rank of the right class / (K − 1), each token as the whole map."""
        labels = labels_B.repeat_interleave(x_BNC.shape[1])
        found = []
        for x, right in zip(x_BNC.flatten(0, 1).split(PART), labels.split(PART), strict=True):
            logits = self.model.classify(x[:, None], Grid(1, 1)).float()
            better = (logits > logits.gather(1, right[:, None])).sum(1)
            found.append(1 - better / max(logits.shape[1] - 1, 1))
        return torch.cat(found).view(x_BNC.shape[:2])

    def _add(self, name: str, key: str, value: Tensor) -> None:
        self.sums[name][key] = self.sums[name].get(key, 0.0) + value.double().item()


def _places(model: nn.Module) -> tuple[list[Place], str]:
    """The blocks behind which tokens have the channels of the head, up to the last; and the stages left out, in words.

    Raises:
        UserError: no model of ours with a head.
    """
    if not isinstance(model, Backbone) or not hasattr(model, "head"):
        raise UserError(
            f"logit_lens: {type(model).__name__} has no head that reads tokens of its layers; choose e.g. vit_tiny"
        )
    first = len(model.stages) - 1
    while first and model.stages[first].downsample is None:
        first -= 1
    last = model.channels[-1]
    places = [
        Place(f"stages.{s}.blocks.{i}", block)
        for s, stage in enumerate(model.stages)
        for i, block in enumerate(stage.blocks)
        if s >= first and getattr(block, "out_dim", last) == last
    ]
    if not places:
        raise UserError(f"logit_lens: the last stage of {type(model).__name__} has no blocks; choose another model")
    return places, "" if not first else "stage 0" if first == 1 else f"stages 0 to {first - 1}"


def _check(model: Backbone, data: pl.LightningDataModule) -> None:
    if isinstance(model.head, nn.Identity):
        raise UserError("logit_lens: the model has no head, got num_classes=0; give a checkpoint of a classifier")
    if data.source.val.labels.ndim > 1:
        raise UserError(
            "logit_lens: ranks are of one right class, got images that may have several; choose probe=multilabel"
        )


def chart(rows: list[dict[str, Any]]) -> Any:
    """Shares by layer, and below the log-loss."""
    figure = canvas(1.6 + max(4.5, 0.45 * len(rows)), 5.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    words = {
        "top1": ("top-1", BLUE, "-"),
        "identifiability": ("class identifiability, tokens", ORANGE, "--"),
        "identifiability_class_token": ("class identifiability, class token", ORANGE, ":"),
    }
    for key, (word, colour, style) in words.items():
        if key in rows[0]:
            upper.plot([row[key] for row in rows], style, color=colour, marker="o", markersize=3, label=word)
    upper.set(title="what the head makes of each layer", ylim=(-0.02, 1.02))
    upper.legend(loc="best", fontsize=8)
    lower.plot([row["loss"] for row in rows], color=BLUE, marker="o", markersize=3)
    lower.set(ylabel="log-loss")
    lower.set_xticks(range(len(rows)), [short(row["layer"]) for row in rows])
    lower.set_xlabel("stage.block")
    return figure


def _shown(rows: list[dict[str, Any]]) -> dict[str, str]:
    words = {"identifiability": "identifiability", "identifiability_class_token": "of the class token"}
    return {
        row["layer"]: f"top-1 {row['top1']:.2%}, loss {row['loss']:.4f}"
        + "".join(f", {word} {row[key]:.3f}" for key, word in words.items() if key in row)
        for row in rows
    }
