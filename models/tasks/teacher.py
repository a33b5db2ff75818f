"""A teacher: a finished classifier by name and file that says what it sees, and is neither trained nor saved.

Shapes: B = batch, K = classes.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.checkpoints import load_weights
from models.checkpoints.conversion import converted
from models.checkpoints.fitting import classes_of
from models.checkpoints.normalisation import for_channels, normalisation
from models.factory import create
from models.surgery.any_timm import fitted

OF_TIMM = "timm/"


class Teacher:
    """Images as the student has them → logits (B, K) in float32, without gradients.

    It is where the images are, and of their type, from its first call on; under autocast it computes as the student.

    Args:
        model: of whom to learn.
        scale, shift: per channel, from the student's normalisation to the teacher's; None where both are the same.
    """

    def __init__(self, model: nn.Module, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.scale, self.shift = scale, shift

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        if (weight.device, weight.dtype) != (images.device, images.dtype):
            self.model.to(images)
        if self.scale is not None:
            self.scale, self.shift = self.scale.to(images), self.shift.to(images)
            images = images * self.scale + self.shift
        return self.model(images).float()


def read_teacher(name: str, path: str, data: Any, num_classes: int) -> Teacher:
    """The teacher for the images of the data.

    Args:
        name: as for `models.create_model`, also `timm/…`.
        path: its weights, as for `models.checkpoints.load_weights`, in our names, its authors' or timm's.
        data: of the run.
        num_classes: K.

    Raises:
        ValueError: there is no such model or file, or it is of other classes or for images of another size.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            _try(name, _settings(data, num_classes), data)
            model = finished(name, path, data, num_classes)
    except (ValueError, OSError) as error:
        raise UserError(f"task: the teacher {name} cannot teach here: {error}") from error
    return Teacher(model, *_change_of(normalisation(path), data))


def finished(name: str, path: str, data: Any, num_classes: int | None) -> nn.Module:
    """The model of that name for the images of the data, with its weights; arguments as of `read_teacher`.

    Without `num_classes` it is for the classes of the file.

    Raises:
        ValueError: there is no such model or file, or it is of other classes or for images of another size.
    """
    content = load_weights(path)
    if num_classes is None and not name.startswith(OF_TIMM):
        num_classes = classes_of(converted(content, name).weights)
    settings = _settings(data, num_classes)
    model = create(name, None, dict(settings))
    model.load_state_dict(_for(name, content, model, settings))
    return model


def _settings(data: Any, num_classes: int | None) -> dict[str, Any]:
    settings = {"image_size": data.image_size} | ({} if num_classes is None else {"num_classes": num_classes})
    return settings if data.channels == 3 else settings | {"in_channels": data.channels}


def _for(name: str, content: dict[str, Tensor], model: nn.Module, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The weights as the model has them; nothing in them is made anew or resized."""
    if name.startswith(OF_TIMM):
        weights = fitted(content, model, new_head=False)[0]
        resized = [key for key, value in weights.items() if key in content and content[key].numel() != value.numel()]
    else:
        weights, resized, *_ = converted(content, name, **settings)
    if resized:
        raise UserError(
            f"the weights are for images of another size, got image_size={settings['image_size']}; set image_size to "
            "that of the teacher, or choose another teacher"
        )
    return weights


def _try(name: str, settings: dict[str, Any], data: Any) -> None:
    """One image of the data's size, without memory: whether it is taken, and what comes out.

    Raises:
        ValueError: it names no classes, or takes images of another size alone.
    """
    size = data.image_size if isinstance(data.image_size, tuple) else (data.image_size, data.image_size)
    with torch.device("meta"):
        model = create(name, None, dict(settings)).eval()
        images = torch.zeros(1, data.channels, *size)
    if getattr(model, "generates", False):
        raise UserError(f"{type(model).__name__} generates images; set task.teacher to a classifier")
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            model(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"it takes images of another size, got image_size={data.image_size} ({reason}); "
            "set image_size, or choose another teacher"
        ) from error


def _change_of(known: tuple[list[float], list[float]] | None, data: Any) -> tuple[Tensor | None, Tensor | None]:
    """(x · std + mean − mean') / std', as a scale and a shift per channel; None for what changes nothing."""
    ours = list(data.mean), list(data.std)
    theirs = for_channels(known, data.channels) if known is not None else None
    if theirs is None or theirs == ours:
        return None, None
    both = torch.tensor([ours, theirs], dtype=torch.float64)[..., None, None]
    (mean, std), (new_mean, new_std) = both
    return (std / new_std).float(), ((mean - new_mean) / new_std).float()
