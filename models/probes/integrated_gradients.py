"""Integrated gradients: how much each pixel adds to the logit of a class on the way from a plain picture to the image.

Source: Axiomatic Attribution for Deep Networks, Sundararajan et al., ICML 2017, arXiv:1703.01365, equations 1 and 3;
computed by captum (Gauss-Legendre quadrature). The sum over all pixels is the difference of the two logits, exactly for
infinitely many steps: `convergence` says how far it is from that.
Shapes: B = batch, C = channels, H W = image.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.values import choice, flag, whole
from models.probes import Report, Subject
from models.probes.explanations import Explained, explained_images, report_of
from models.probes.reading.maps import check_classifies

WHO = "integrated_gradients"
BASELINES = ("mean", "black", "white")
AT_ONCE = 16  # points of the way
FINEST = 56  # cells along a side of what is drawn and written
CLOSE = 0.05  # a convergence of more is said


class Integrated(NamedTuple):
    """attributions: (B, C, H, W). difference: of the logits of image and baseline, (B,). error: by how much the sum of
    the attributions is more, (B,)."""

    attributions: Tensor
    difference: Tensor
    error: Tensor


def integrated_gradients(
    model: nn.Module,
    data: pl.LightningDataModule,
    subject: Subject,
    input: Any = None,
    images: int = 4,
    steps: int = 50,
    baseline: str = "mean",
    target: str | int = "top",
    deletion: bool = True,
) -> Report:
    """A map of each image, how far it is from complete, and the deletion test.

    Args:
        model, data, subject, input: see `models.probes`.
        images: how many.
        steps: points of the way where the gradient is taken.
        baseline: the plain picture that it starts from: "mean", of the colours of the image, "black" or "white".
        target: the class, see `models.probes.reading.targets`.
        deletion: the test too.

    Raises:
        UserError: options that are wrong, or a model that names no class.
    """
    whole("probe", "steps", steps, 2, fix="set probe.steps=50")
    choice("probe", "baseline", baseline, BASELINES, fix="set probe.baseline=mean")
    flag("probe", "deletion", deletion, fix="set probe.deletion=true or false")
    check_classifies(WHO, model)
    done: list[Integrated] = []

    def explain(image_1CHW: Tensor, target_1: Tensor) -> Explained:
        done.append(integrated(model, image_1CHW, plain(image_1CHW, baseline, data), target_1, steps))
        return Explained(positive(done[-1].attributions), {})

    found = explained_images(WHO, model, data, images, explain, target, labelled=input is None)
    return _with_convergence(report_of(WHO, model, data, subject, found, deletion=deletion), done)


def integrated(
    model: nn.Module, images_BCHW: Tensor, baseline_BCHW: Tensor, targets_B: Tensor, steps: int
) -> Integrated:
    """By captum; see `integrated_gradients`."""
    from captum.attr import IntegratedGradients

    images = images_BCHW.detach().requires_grad_()
    with torch.enable_grad():
        attributions = IntegratedGradients(model).attribute(
            images, baseline_BCHW, targets_B, n_steps=steps, internal_batch_size=max(AT_ONCE, len(images))
        )
    with torch.no_grad():
        ends = [model(x).gather(1, targets_B[:, None])[:, 0] for x in (images, baseline_BCHW)]
    attributions, difference = attributions.detach(), ends[0] - ends[1]
    return Integrated(attributions, difference, attributions.sum((1, 2, 3)) - difference)


def plain(images_BCHW: Tensor, kind: str, data: pl.LightningDataModule) -> Tensor:
    """The picture of one colour that a way starts from, normalised as the images are."""
    if kind == "mean":
        return images_BCHW.mean((2, 3), keepdim=True).expand_as(images_BCHW)
    mean, std = (torch.tensor(values).to(images_BCHW).view(1, -1, 1, 1) for values in (data.mean, data.std))
    return ((float(kind == "white") - mean) / std).expand_as(images_BCHW)


def positive(attributions_BCHW: Tensor) -> Tensor:
    """What speaks for the class, of pixels with all channels together; a fine map is averaged, (B, Y, X)."""
    of_pixels = attributions_BCHW.sum(1).clamp_min(0)
    sides = tuple(min(side, FINEST) for side in of_pixels.shape[1:])
    return F.adaptive_avg_pool2d(of_pixels[:, None], sides)[:, 0]


def _with_convergence(report: Report, done: list[Integrated]) -> Report:
    """How much of the difference of the logits is missing or too much, over all images, and of each."""
    differences, errors = (torch.cat([getattr(one, name) for one in done]) for name in ("difference", "error"))
    convergence = float(errors.abs().sum() / differences.abs().sum().clamp_min(1e-12))
    table = [
        row | {"logit_difference": round(difference, 6), "sum": round(difference + error, 6)}
        for row, difference, error in zip(report.tables["images"], differences.tolist(), errors.tolist(), strict=True)
    ]
    line = f"convergence: the sums over the pixels are {convergence:.2%} off the differences of the logits"
    more = "; raise probe.steps" if convergence > CLOSE else ""
    return replace(
        report,
        figures=report.figures | {"convergence": convergence},
        rows=(report.rows or {}) | {"convergence": f"{convergence:.2%}"},
        tables=report.tables | {"images": table},
        lines=[*report.lines, line + more],
    )
