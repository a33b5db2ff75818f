"""The map that each stage of a model ends with, of ours or of timm's.

Shapes: B = batch, C = channels, H W = map.
"""

from torch import Tensor, nn

from conf.errors import UserError
from models.backbones.base import Backbone, check_maps


def check_stage_maps(who: str, model: nn.Module) -> None:
    """Refuses a model that has none.

    Raises:
        UserError: naming it.
    """
    if isinstance(model, Backbone):
        check_maps(model, who)
    elif getattr(model, "generates", False) or not hasattr(model, "forward_intermediates"):
        raise UserError(f"{who}: {type(model).__name__} has no maps of its stages; choose a classifier, e.g. vit_tiny")


def stage_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """(B, C, H, W) of each stage by name, "stage 0" first; a ViT has four places at equal distance in its depth."""
    if isinstance(model, Backbone):
        maps = model.forward_pyramid(images)
    else:
        maps = model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    return {f"stage {number}": stage for number, stage in enumerate(maps)}
