"""Distillation: a classifier learns from what a finished one says of the same images, besides from their labels.

With the weight α, the logits z of the head for the labels y, z' of the head for the teacher, and t of the teacher:

    hard: (1 − α) · CE(z, y) + α · CE(z', argmax t)
    soft: (1 − α) · CE(z, y) + α · τ² · KL(softmax(t / τ) ‖ softmax(z' / τ))

Source: Training data-efficient image transformers & distillation through attention, Touvron et al., ICML 2021,
arXiv:2012.12877, section 4, equations 2 and 3. KL is the mean over images, as in the paper; the authors' code divides
by the number of classes too. A model without a second head has z' = z. The teacher sees the images as the student does,
mixed and erased, in the normalisation that its own weights know, where that is known.
Shapes: B = batch, K = classes.
"""

from typing import Any

import pytorch_lightning as pl
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import UserError
from conf.values import is_number
from models.tasks.teacher import Teacher, read_teacher

KINDS = ("hard", "soft")


class Distillation:
    """The loss on what a teacher says. It is no module: what it has of a teacher is in no checkpoint and not trained.

    Args:
        kind: `hard` or `soft`.
        teacher, weights: a name for `create_model`, and a file of its weights, see `models.tasks.teacher`.
        weight: α, in [0, 1].
        temperature: τ, of `soft`.

    Raises:
        ValueError: a setting out of range, or no teacher.
    """

    def __init__(self, kind: Any, teacher: Any, weights: Any, weight: Any, temperature: Any) -> None:
        _check(kind, teacher, weights, weight, temperature)
        self.kind, self.name, self.weights = kind, teacher, weights
        self.weight, self.temperature = weight, temperature
        self.teacher: Teacher | None = None

    def prepare(self, data: pl.LightningDataModule, num_classes: int) -> None:
        """Makes the teacher for the images and classes of the data, once, with no random number of the run's."""
        if self.teacher is None:
            self.teacher = read_teacher(self.name, self.weights, data, num_classes)

    def loss(self, logits_BK: Tensor, images: Tensor) -> Tensor:
        """Of the head for the teacher, in float32; the mean over images."""
        said_BK = self.teacher(images)
        if self.kind == "hard":
            return F.cross_entropy(logits_BK, said_BK.argmax(1))
        ours_BK, theirs_BK = ((x / self.temperature).log_softmax(1) for x in (logits_BK, said_BK))
        return self.temperature**2 * F.kl_div(ours_BK, theirs_BK, reduction="batchmean", log_target=True)

    def with_labels(self, of_labels: Tensor, of_teacher: Tensor) -> Tensor:
        """Both losses as one."""
        return (1 - self.weight) * of_labels + self.weight * of_teacher


def distillation_of(
    kind: str | None, teacher: str | None, weights: str | None, weight: float, temperature: float
) -> Distillation | None:
    """That of a task; None without.

    Raises:
        ValueError: a setting out of range, or a teacher without distillation.
    """
    if kind not in (None, "none"):
        return Distillation(kind, teacher, weights, weight, temperature)
    if teacher is not None or weights is not None:
        raise UserError(
            f"task: a teacher is for distillation, got task.teacher={teacher} task.teacher_weights={weights} beside "
            "task.distillation=null; set task.distillation=hard or soft, or leave the teacher out"
        )
    return None


def with_both_heads(
    model: nn.Module, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits for the labels and for the teacher, and auxiliary losses, of one pass of a model with two heads."""
    x_BNC, grid, losses = model.forward_tokens(images)
    features, of_pool = model.pooled_with_losses(x_BNC, grid, labels)
    return *model.both_logits(features), losses | of_pool


def has_two_heads(model: nn.Module) -> bool:
    """Whether the second one of a model is for the teacher.

    Raises:
        ValueError: it has two that are only given as one.
    """
    if getattr(model, "head_dist", None) is not None:
        raise UserError(
            f"task: the two heads of {type(model).__name__} of timm are only given as their mean, got "
            "task.distillation; choose a model with one head, or swiftformer_..."
        )
    return getattr(model, "distill_head", None) is not None


def _check(kind: Any, teacher: Any, weights: Any, weight: Any, temperature: Any) -> None:
    if kind not in KINDS:
        raise UserError(
            f"task: distillation must be {' or '.join(KINDS)}, or null, got {kind!r}; set task.distillation"
        )
    if teacher is None:
        raise UserError(
            f"task: distillation={kind} needs a teacher, got task.teacher=null; give the name of a model, "
            "e.g. task.teacher=timm/regnety_160"
        )
    if weights is None:
        raise UserError(
            f"task: a teacher needs its trained weights, got task.teacher={teacher} task.teacher_weights=null; give "
            "the file, the folder of a run or a name of the hub"
        )
    if not is_number(weight, 0) or weight > 1:
        raise UserError(
            f"task: distillation_weight must be a number in [0, 1], got {weight!r}; set task.distillation_weight"
        )
    if not is_number(temperature, 0) or temperature <= 0:
        raise UserError(f"task: temperature must be a positive number, got {temperature!r}; set task.temperature")
