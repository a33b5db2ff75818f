"""Which class of an image is explained: `target=top`, the label, or one by its number or name.

Shapes: B = images, K = classes.
"""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor

from conf.errors import UserError
from conf.names import nearest
from conf.values import is_whole

FIX = "set probe.target=top, label, a number or a name"


def check_target(who: str, target: str | int, data: pl.LightningDataModule, labelled: bool) -> None:
    """Refuses a class that the model does not have, and labels where there are none.

    Args:
        who: the probe.
        target: "top", "label", or a class.
        data: knows the classes.
        labelled: whether the images have labels.
    """
    if target == "label" and not labelled:
        raise UserError(f"{who}: the images of input= have no labels, got target=label; set probe.target=top")
    if target not in ("top", "label"):
        _number(who, target, data)


def target_classes(
    who: str, target: str | int, data: pl.LightningDataModule, logits_BK: Tensor, labels: Sequence[int] | None
) -> Tensor:
    """The class of each image, (B,); see `check_target`."""
    if target == "top":
        return logits_BK.argmax(-1)
    if target == "label":
        return torch.tensor(labels, device=logits_BK.device)
    return torch.full((len(logits_BK),), _number(who, target, data), device=logits_BK.device)


def _number(who: str, target: str | int, data: pl.LightningDataModule) -> int:
    names = list(map(str, data.class_names))
    if is_whole(target, 0) and target < data.num_classes:
        return target
    if isinstance(target, str) and target in names:
        return names.index(target)
    if isinstance(target, str):
        raise UserError(f"{who}: there is no class {target!r}{nearest(target, names)}; {FIX}")
    raise UserError(f"{who}: target must be a class from 0 to {data.num_classes - 1}, got {target!r}; {FIX}")
