"""Transformer attribution: attention weighed by the relevance of a class that goes through it, and by its gradient.

Source: Chefer et al., Transformer Interpretability Beyond Attention Visualization, CVPR 2021, arXiv:2012.09838; see
`models.probes.reading.propagation`. The authors' code sums over the batch, so that an image's map depends on its
neighbours; here every image stands for itself, unless `coupled`.
Shapes: B = batch, N = prefix + H·W tokens, Y X = map.
"""

from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.values import choice, flag, refuse, whole
from models.probes import Report, Subject
from models.probes.explanations import Explained, explained_images, report_of
from models.probes.reading.propagation import (
    Relevance,
    attribution_map,
    check_propagates,
    last_layer_map,
    of_cells,
    propagate,
)

WHO = "attribution"
METHODS = ("transformer_attribution", "last_layer", "full")
FINEST = 56  # cells along a side of a map of pixels


def attribution(
    model: nn.Module,
    data: pl.LightningDataModule,
    subject: Subject,
    input: Any = None,
    images: int = 4,
    method: str = "transformer_attribution",
    start: int = 0,
    target: str | int = "top",
    coupled: bool = False,
    deletion: bool = True,
) -> Report:
    """A map of each image, and the deletion test.

    Args:
        model, data, subject, input: see `models.probes`.
        images: how many.
        method: "transformer_attribution", the paper's; "last_layer", relevance of the last attention alone; "full",
            relevance of the pixels.
        start: the first block that the paper's method takes.
        target: the class, see `models.probes.reading.targets`.
        coupled: sums over all images, as the authors' code has them.
        deletion: the test too.

    Raises:
        UserError: options that are wrong, or a model with a part that has no rule.
    """
    choice("probe", "method", method, METHODS, fix=f"set probe.method={METHODS[0]}")
    flag("probe", "coupled", coupled, fix="set probe.coupled=true or false")
    flag("probe", "deletion", deletion, fix="set probe.deletion=true or false")
    check_propagates(WHO, model)
    _check_start(start, sum(len(stage.blocks) for stage in model.stages))

    arrived: list[Tensor] = []

    def explain(image_1CHW: Tensor, target_1: Tensor) -> Explained:
        relevance = propagate(model, image_1CHW, target_1)
        arrived.append(relevance.sums)
        return Explained(relevance_map(relevance, method, start), {})

    found = explained_images(WHO, model, data, images, explain, target, labelled=input is None)
    if coupled:
        relevance = propagate(model, found.images.batch, found.targets, coupled=True)
        maps, arrived = relevance_map(relevance, method, start), [relevance.sums]
        found = found._replace(explained=[Explained(map_1YX, {}) for map_1YX in maps.split(1)])
    return _with_conservation(report_of(WHO, model, data, subject, found, deletion=deletion), torch.cat(arrived))


def relevance_map(relevance: Relevance, method: str, start: int = 0) -> Tensor:
    """(B, Y, X), of the patches, or of pixels, see `attribution`."""
    if method == "full":
        sides = tuple(min(side, FINEST) for side in relevance.pixels.shape[1:])
        return F.adaptive_avg_pool2d(relevance.pixels.clamp(min=0)[:, None], sides)[:, 0]
    of_tokens = last_layer_map(relevance) if method == "last_layer" else attribution_map(relevance, start)
    return of_cells(relevance, of_tokens)


def _with_conservation(report: Report, sums: Tensor) -> Report:
    """How much of the relevance 1 of an image is too little or too much in front of a block, at most."""
    conservation = float((sums - 1).abs().max())
    line = f"conservation: of an image's relevance of 1 at most {conservation:.2g} is lost or added up to any block"
    return replace(report, figures=report.figures | {"conservation": conservation}, lines=[*report.lines, line])


def _check_start(start: int, blocks: int) -> None:
    """Refuses a block that is none."""
    whole("probe", "start", start, 0, fix="set probe.start=0")
    if start >= blocks:
        refuse("probe", "start", f"a block from 0 to {blocks - 1}", start, "set probe.start=0")
