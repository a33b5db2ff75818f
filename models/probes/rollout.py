"""Attention rollout: which cells what the classifier reads comes from, by the product of the matrices of all layers.

Source: Quantifying Attention Flow in Transformers, Abnar and Zuidema, ACL 2020, arXiv:2005.00928, section 3.1;
`heads` and `discard` as Gildenblat has them for ViT.
A layer is half its matrix, half its residual connection: Ã = A + I with rows scaled to sum to one. The map is the row
of the product Ã_L … Ã_1 that the classifier reads; it depends on no class. Stages: see `models.probes.reading.paths`.
What Chefer et al. record as rollout multiplies relevance instead of weights, see `models.probes.reading.propagation`.
Shapes: B = images, M = heads, N = tokens, Q = rows of shares, Y X = map.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf import looking
from conf.errors import UserError
from conf.looking import Point
from conf.values import choice, flag, is_number, refuse
from models.attention import Mixer
from models.attention.recording import Call, recorded
from models.probes import Report, Subject
from models.probes.explanations import Explained, explained_images, report_of
from models.probes.reading.layers import kind_of
from models.probes.reading.paths import as_map, followed, followed_back, readers

WHO = "rollout"
HEADS = ("mean", "max", "min")
ROUNDING = 1e-3  # how far above one the sum of a row may be


def rollout(
    model: nn.Module,
    data: pl.LightningDataModule,
    subject: Subject,
    input: Any = None,
    images: int = 4,
    heads: str = "mean",
    discard: float = 0.0,
    stages: str = "last",
    point: Any = None,
    deletion: bool = True,
) -> Report:
    """A map of each image, how it comes about layer by layer, and the deletion test of all.

    Args:
        model, data, subject, input: see `models.probes`.
        images: how many.
        heads: how they become one matrix: "mean", "max" or "min".
        discard: the share of the weights of every matrix that is left out, the smallest.
        stages: "last", those with the map of the last one, or "all".
        point: fractions from the left and from the top: of the token there instead of what the classifier reads.
        deletion: the test too, which a map of a point is not given.

    Raises:
        UserError: options that are wrong, or a layer without a matrix whose rows sum to one.
    """
    check_heads(heads, discard)
    flag("probe", "deletion", deletion, fix="set probe.deletion=true or false")
    point = looking.point(point)
    layers = followed(WHO, model, stages, stochastic=True)

    def explain(image_1CHW: Tensor, _: Tensor) -> Explained:
        return rollout_maps(model, image_1CHW, layers, heads, discard, point)

    explained = explained_images(WHO, model, data, images, explain, labelled=input is None)
    return report_of(WHO, model, data, subject, explained, deletion and point is None, point)


def check_heads(heads: str, discard: float = 0.0) -> None:
    """Refuses options that are wrong."""
    choice("probe", "heads", heads, HEADS, fix="set probe.heads=mean")
    if not is_number(discard, 0) or discard >= 1:
        refuse("probe", "discard", "a share from 0 to below 1", discard, "set probe.discard=0")


@torch.no_grad()
def rollout_maps(
    model: nn.Module,
    images_BCHW: Tensor,
    layers: dict[str, Mixer],
    heads: str = "mean",
    discard: float = 0.0,
    point: Point | None = None,
) -> Explained:
    """The map of each image, and what is read of the tokens of every later layer; see `rollout`."""
    calls = called(model, images_BCHW, layers)
    reads_B1N = readers(model, images_BCHW, list(calls.values())[-1].grid, point)

    def step(name: str, reads_BQN: Tensor) -> Tensor:
        return reads_BQN @ with_residual(layers[name], name, calls[name], heads, discard)

    found = {name: as_map(reads, grid)[:, 0] for name, reads, grid in followed_back(reads_B1N, calls, step)}
    return Explained.of(found)


def called(model: nn.Module, images_BCHW: Tensor, layers: dict[str, Mixer]) -> dict[str, Call]:
    """What the layers are given of these images, in the order of the forward pass."""
    with recorded(model) as calls:
        model(images_BCHW)
    return {name: call for name, call in calls.items() if name in layers}


def with_residual(mixer: Mixer, name: str, call: Call, heads: str, discard: float, who: str = WHO) -> Tensor:
    """Ã (B, N, N): a layer's matrix of all tokens on all tokens and the residual connection, half and half.

    Raises:
        UserError: weights below zero, or rows that sum to more than one.
    """
    weights_BMNN = mixer.token_weights(*call, **call.named).on_tokens().float()
    sums_BMN1 = weights_BMNN.sum(-1, keepdim=True)
    if weights_BMNN.min() < -1e-6 or sums_BMN1.max() > 1 + ROUNDING:
        raise UserError(
            f"{who}: the weights of {name} ({kind_of(mixer)}) must be shares, got {weights_BMNN.min():.3g} as the "
            f"smallest and rows that sum to up to {sums_BMN1.max():.3g}; choose probe=relevance, or e.g. "
            "attention=softmax"
        )
    weights_BMNN = weights_BMNN / sums_BMN1.clamp_min(ROUNDING)  # without what padding is given
    fused_BNN = fused(weights_BMNN, heads, discard)
    kept_BNN = fused_BNN + torch.eye(fused_BNN.shape[-1], device=fused_BNN.device)
    return kept_BNN / kept_BNN.sum(-1, keepdim=True)


def fused(weights_BMNN: Tensor, heads: str, discard: float = 0.0) -> Tensor:
    """(B, N, N): all heads as one, without the smallest share `discard` of its weights."""
    fused_BNN = {"mean": weights_BMNN.mean, "max": weights_BMNN.amax, "min": weights_BMNN.amin}[heads](1)
    count = int(discard * fused_BNN[0].numel())
    if count:
        smallest = fused_BNN.flatten(1).argsort(dim=1, stable=True)[:, :count]
        fused_BNN = fused_BNN.flatten(1).scatter(1, smallest, 0.0).view_as(fused_BNN)
    return fused_BNN
