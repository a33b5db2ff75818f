"""Deep supervision: a second classifier, of what a model knows halfway, learns from the same labels.

Source: OverLoCK, Lou & Yu, CVPR 2025, arXiv:2502.20087, whose overview has one with 0.4 of the weight; the loss is that
of the model's own head. It belongs to training, and nothing else reads it.
Shapes: B = batch, K = classes.
"""

from torch import Tensor, nn

from conf.errors import UserError


def is_supervised(model: nn.Module) -> bool:
    """Whether it has such a classifier: then `forward_supervised(images)` gives the logits (B, K) of both."""
    return getattr(model, "aux_head", None) is not None


def with_overview(
    model: nn.Module, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits, auxiliary losses, and the logits of the second classifier, of one pass."""
    return model.forward_supervised(images, labels)


def check_alone(model: nn.Module, **trains: bool) -> None:
    """Refuses such a model where its second classifier would learn nothing.

    Args:
        model: with a wrapper, which goes other ways through it, or without.
        trains: what trains the model, and whether it does.

    Raises:
        ValueError: it has a second classifier.
    """
    trains |= {"a wrapper": getattr(model, "wrapper", None) is not None}
    for what in (name for name, does in trains.items() if does and is_supervised(model)):
        raise UserError(
            f"task: {what} trains one classifier, got {type(model).__name__} with another one of its overview; set "
            "model.auxiliary=false"
        )
