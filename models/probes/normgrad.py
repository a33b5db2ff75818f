"""NormGrad: where the weights of a layer that is not there would learn most from an image.

A virtual layer that changes nothing stands behind a block; the gradient of its weights is a sum over positions, and the
norm of each position's part is the map. For a 1×1 convolution that is the norm of the map times that of its gradient.

Source: There and Back Again: Revisiting Backpropagation Saliency Methods, Rebuffi et al., CVPR 2020, arXiv:2004.02866,
sections 3.2 to 3.4 and table 1.
Shapes: B = batch, C = channels, Y X = map.
"""

from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.values import choice, flag
from models.probes import Report, Subject
from models.probes.explanations import Explained, explained_images, report_of
from models.probes.reading.maps import chosen_places, maps_through

WHO = "normgrad"
VIRTUAL = ("conv1x1", "conv3x3", "scaling", "bias")
COMBINE = ("product", "sum")


def normgrad(
    model: nn.Module,
    data: pl.LightningDataModule,
    subject: Subject,
    input: Any = None,
    images: int = 4,
    layers: Any = "stages",
    virtual: str = "conv1x1",
    combine: str = "product",
    target: str | int = "top",
    deletion: bool = True,
) -> Report:
    """A map of each image, that of each layer, and the deletion test.

    Args:
        model, data, subject, input: see `models.probes`.
        images: how many.
        layers: see `models.probes.reading.maps.chosen_places`.
        virtual: the layer that is not there, one of `VIRTUAL`.
        combine: "product", the geometric mean over the layers, or "sum", the mean.
        target: the class whose loss is taken, see `models.probes.reading.targets`.
        deletion: the test too.

    Raises:
        UserError: options that are wrong, or a model without such maps.
    """
    choice("probe", "virtual", virtual, VIRTUAL, fix="set probe.virtual=conv1x1")
    choice("probe", "combine", combine, COMBINE, fix="set probe.combine=product")
    flag("probe", "deletion", deletion, fix="set probe.deletion=true or false")
    blocks = chosen_places(WHO, model, layers)

    def explain(image_1CHW: Tensor, target_1: Tensor) -> Explained:
        maps = normgrad_maps(model, image_1CHW, target_1, blocks, virtual)
        return Explained(combined(list(maps.values()), combine), maps if len(maps) > 1 else {})

    found = explained_images(WHO, model, data, images, explain, target, labelled=input is None)
    report = report_of(WHO, model, data, subject, found, deletion=deletion)
    layers_of = {"layers": len(blocks)}  # what they are combined to is none
    return replace(report, figures=report.figures | layers_of, rows=(report.rows or {}) | layers_of)


def normgrad_maps(
    model: nn.Module, images_BCHW: Tensor, targets_B: Tensor, blocks: dict[str, nn.Module], virtual: str = "conv1x1"
) -> dict[str, Tensor]:
    """The map (B, Y, X) behind each block, of the gradient of the cross entropy; see `normgrad`."""
    maps: dict[str, Tensor] = {}
    with torch.enable_grad(), maps_through(model, blocks) as places:
        for name, place in places.items():
            place.register_forward_hook(lambda *call, name=name: maps.update({name: call[-1]}))
        loss = F.cross_entropy(model(images_BCHW.detach().requires_grad_()).float(), targets_B, reduction="sum")
        gradients = torch.autograd.grad(loss, list(maps.values()))
    return {
        name: of_virtual_layer(x.detach(), gradient, virtual)
        for (name, x), gradient in zip(maps.items(), gradients, strict=True)
    }


def of_virtual_layer(x_BCYX: Tensor, gradient_BCYX: Tensor, virtual: str) -> Tensor:
    """The norm at each position of the gradient of the weights of an identity behind a map, (B, Y, X).

    Args:
        x_BCYX: the map.
        gradient_BCYX: of the loss by it.
        virtual: convolutions pad with zeros; "scaling" and "bias" have one weight per channel.
    """
    if virtual == "scaling":
        return (gradient_BCYX * x_BCYX).norm(dim=1)
    norms_BYX = gradient_BCYX.norm(dim=1)
    if virtual == "bias":
        return norms_BYX
    energy_B1YX = x_BCYX.square().sum(1, keepdim=True)
    if virtual == "conv3x3":
        energy_B1YX = F.avg_pool2d(energy_B1YX, 3, stride=1, padding=1, divisor_override=1)
    return norms_BYX * energy_B1YX[:, 0].sqrt()


def combined(maps_BYX: list[Tensor], how: str) -> Tensor:
    """Of the size of the finest; each counts alike, by its largest value."""
    sides = max(tuple(m.shape[1:]) for m in maps_BYX)
    scaled = [m / m.amax((1, 2), keepdim=True).clamp_min(1e-30) for m in maps_BYX]
    fitted = [F.interpolate(m[:, None], sides, mode="bilinear", align_corners=False)[:, 0] for m in scaled]
    if how == "sum":
        return torch.stack(fitted).mean(0)
    return torch.stack(fitted).prod(0) ** (1 / len(fitted))
