"""What makes maps parts of an object: each somewhere, one per cell, smooth, different, and turned with the image.

Source: PDiscoFormer, Aniraj et al., ECCV 2024, arXiv:2407.04538, section 3.3, in the forms and with the ranges of
rotation (±90°), shift (±11 %) and scale (0.8 … 1.4) of iFAM's code, ananthu-aniraj/ifam at commit bc8eeae.
Shapes: B = batch, J = K parts and the background last, C = channels, H W = map.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREES, SHIFT, SCALES = 90.0, 0.11, (0.8, 1.4)


def losses_of_parts(maps_BJHW: Tensor, features_BJC: Tensor) -> dict[str, Tensor]:
    """All that need one pass, by name."""
    smooth = F.avg_pool2d(maps_BJHW, [min(3, side) for side in maps_BJHW.shape[2:]], stride=1)
    return {
        "presence": 1 - smooth[:, :-1].amax((0, 2, 3)).mean(),  # each part in some image of the batch
        "background": _at_the_edge(smooth[:, -1]),
        "orthogonality": orthogonality(features_BJC),
        "entropy": -(maps_BJHW * maps_BJHW.clamp_min(1e-12).log()).sum(1).mean(),
        "variation": variation(maps_BJHW),
    }


def orthogonality(features_BJC: Tensor) -> Tensor:
    """The mean square of what the cosines of features have besides ones with themselves."""
    unit = F.normalize(features_BJC.float(), dim=-1)
    cosines_BJJ = unit @ unit.mT
    return (cosines_BJJ - torch.eye(cosines_BJJ.shape[-1], device=unit.device)).square().mean()


def variation(maps_BJHW: Tensor) -> Tensor:
    """Differences of neighbours along both axes, summed over maps, per cell."""
    down, across = maps_BJHW.diff(dim=2).abs().sum(), maps_BJHW.diff(dim=3).abs().sum()
    return (down + across) / (maps_BJHW.numel() / maps_BJHW.shape[1])


def equivariance(images: Tensor, maps_BJHW: Tensor, find: Callable[[Tensor], Tensor]) -> Tensor:
    """1 − the mean cosine of maps of parts and of those of turned images, turned back; one turn for a batch."""
    drawn_4 = torch.rand(4, device=images.device)
    angle, shift_2 = math.radians(DEGREES) * (2 * drawn_4[0] - 1), 2 * SHIFT * (2 * drawn_4[1:3] - 1)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * drawn_4[3]
    turn = rigid(angle, shift_2, scale, images.shape[-1] / images.shape[-2])
    back = turned(find(turned(images, turn)), torch.linalg.inv_ex(turn).inverse)
    return 1 - F.cosine_similarity(maps_BJHW[:, :-1].flatten(2), back[:, :-1].flatten(2), dim=-1).mean()


def rigid(angle: Tensor, shift_2: Tensor, scale: Tensor, aspect: float) -> Tensor:
    """(3, 3): rotation, shift and scale between places in −1 … 1 of images `aspect` times as wide as high."""
    cos, sin, one = angle.cos() / scale, angle.sin() / scale, torch.ones_like(scale)
    rows = [cos, -sin / aspect, shift_2[0], sin * aspect, cos, shift_2[1], 0 * one, 0 * one, one]
    return torch.stack(rows).view(3, 3)


def turned(images: Tensor, turn: Tensor) -> Tensor:
    """(B, C, H, W), every place with what is at `turn` of it; zeros from outside."""
    theta = turn[:2].to(images).expand(images.shape[0], -1, -1)
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, align_corners=False)


def _at_the_edge(background_BHW: Tensor) -> Tensor:
    """−log of the largest share of the background, each cell weighted by its squared distance from the centre."""
    height, width = background_BHW.shape[1:]
    y, x = (torch.linspace(-1, 1, side, device=background_BHW.device) for side in (height, width))
    away_HW = y[:, None].square() + x.square()
    away_HW = away_HW / away_HW.max().clamp_min(1e-12)
    return -(background_BHW * away_HW).amax((1, 2)).clamp(1e-12, 1).log().mean()
