"""Relevance of cells for a class, by the weights of all layers times their gradients.

Source: Generic Attention-model Explainability, Chefer, Gur and Wolf, ICCV 2021, arXiv:2103.15679, equations 5 and 6.
R = I at first; each layer adds Ē R to it, where Ē is the mean over heads of (∂y_c/∂A ∘ A)⁺. The map is what R adds to
what the classifier reads. Rows of A need not sum to one. Stages: see `models.probes.reading.paths`; what attention
weights of a pool read is taken as it is, without its gradient.
Shapes: B = images, M = heads, N = tokens, Q = rows of shares, Y X = map.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf.values import flag
from models.attention import Mixer
from models.attention.explain import explained
from models.attention.recording import recorded
from models.probes import Report, Subject
from models.probes.explanations import Explained, explained_images, report_of
from models.probes.reading.paths import as_map, followed, followed_back, readers

WHO = "relevance"


def relevance(
    model: nn.Module,
    data: pl.LightningDataModule,
    subject: Subject,
    input: Any = None,
    images: int = 4,
    target: str | int = "top",
    stages: str = "last",
    deletion: bool = True,
) -> Report:
    """A map of each image for a class, how it comes about layer by layer, and the deletion test of all.

    Args:
        model, data, subject, input: see `models.probes`.
        images: how many.
        target: "top", the class that the model says, "label", or a class by its number or name.
        stages: "last", those with the map of the last one, or "all".
        deletion: the test too.

    Raises:
        UserError: options that are wrong, or a layer without a matrix.
    """
    flag("probe", "deletion", deletion, fix="set probe.deletion=true or false")
    layers = followed(WHO, model, stages)

    def explain(image_1CHW: Tensor, target_1: Tensor) -> Explained:
        return relevance_maps(model, image_1CHW, target_1, layers)

    found = explained_images(WHO, model, data, images, explain, target, labelled=input is None)
    return report_of(WHO, model, data, subject, found, deletion)


def relevance_maps(model: nn.Module, images_BCHW: Tensor, targets_B: Tensor, layers: dict[str, Mixer]) -> Explained:
    """The map of each image for its class, and what is relevant at every later layer; see `relevance`."""
    with torch.enable_grad(), recorded(model) as calls, explained(model) as matrices:
        logits_BK = model(images_BCHW.detach().requires_grad_())
    calls = {name: call for name, call in calls.items() if name in layers}
    weights = [matrices[name][0] for name in calls]
    score = logits_BK.gather(1, targets_B[:, None]).sum()
    gradients = torch.autograd.grad(score, weights, allow_unused=True, materialize_grads=True)
    counts = dict(zip(calls, zip(weights, gradients, strict=True), strict=True))
    start_B1N = readers(model, images_BCHW, list(calls.values())[-1].grid)

    def step(name: str, reads_B2N: Tensor) -> Tensor:
        """The first row is what layers have added, the second what would be read without."""
        matrix, gradient = counts[name]
        positive = (gradient * matrix).clamp_min(0).float()
        added_BNN = layers[name].over_tokens(positive, *calls[name]).on_tokens().mean(1)
        return torch.cat([reads_B2N[:, :1] + reads_B2N.sum(1, keepdim=True) @ added_BNN, reads_B2N[:, 1:]], dim=1)

    with torch.no_grad():
        steps = followed_back(torch.cat([torch.zeros_like(start_B1N), start_B1N], dim=1), calls, step)
        maps = {name: as_map(reads, grid)[:, 0] for name, reads, grid in steps}
    return Explained.of(maps)
