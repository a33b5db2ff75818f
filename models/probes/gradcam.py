"""Grad-CAM: the channels of a map, each weighed by how much the class depends on it on average.

Source: Selvaraju et al., ICCV 2017, arXiv:1610.02391, equations 1 and 2; computed by captum.
Of tokens it is the map that they make up; class tokens have no place in it.
Shapes: B = batch, C = channels, Y X = map.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf.values import flag
from models.probes import Report, Subject
from models.probes.explanations import Explained, explained_images, report_of
from models.probes.reading.maps import chosen_places, maps_through

WHO = "gradcam"


def gradcam(
    model: nn.Module,
    data: pl.LightningDataModule,
    subject: Subject,
    input: Any = None,
    images: int = 4,
    layers: Any = "last",
    target: str | int = "top",
    deletion: bool = True,
) -> Report:
    """A map of each image, and the deletion test.

    Args:
        model, data, subject, input: see `models.probes`.
        images: how many.
        layers: see `models.probes.reading.maps.chosen_places`; the last of several is the map, others stand beside it.
        target: the class, see `models.probes.reading.targets`.
        deletion: the test too.

    Raises:
        UserError: options that are wrong, or a model without such maps.
    """
    flag("probe", "deletion", deletion, fix="set probe.deletion=true or false")
    blocks = chosen_places(WHO, model, layers)

    def explain(image_1CHW: Tensor, target_1: Tensor) -> Explained:
        return Explained.of(gradcam_maps(model, image_1CHW, target_1, blocks))

    found = explained_images(WHO, model, data, images, explain, target, labelled=input is None)
    return report_of(WHO, model, data, subject, found, deletion=deletion)


def gradcam_maps(
    model: nn.Module, images_BCHW: Tensor, targets_B: Tensor, blocks: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """The map (B, Y, X) behind each block: the positive part of the weighed sum."""
    from captum.attr import LayerGradCam

    images = images_BCHW.detach().requires_grad_()
    with torch.enable_grad(), maps_through(model, blocks) as places:
        return {
            name: LayerGradCam(model, place).attribute(images, target=targets_B, relu_attributions=True)[:, 0].detach()
            for name, place in places.items()
        }
