"""The end of a backbone that names the class of an image: its pool and its head."""

from collections.abc import Callable

from torch import nn

from conf.errors import UserError
from models.layers.pooled import Pool


def init_weights(module: nn.Module) -> None:
    """Linear layers: truncated normal with standard deviation 0.02 and zero bias, as in DeiT and Swin."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def classifier(dim: int, num_classes: int) -> nn.Module:
    """The last layer: Linear, or Identity for 0 classes."""
    if num_classes < 0:
        raise UserError(f"num_classes: must be 0 (no head) or more, got {num_classes}; set model.num_classes")
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def put_pool_and_head(
    model: nn.Module, pool: Callable[..., Pool] | None, head: Callable[[int, int], nn.Module] | None
) -> None:
    """A pool in the place of the mean or the class token, and a head in the place of the Linear; None for as it is.

    A norm behind the pooling stays, made anew where the pool changes the number of channels. The `own_pool` of a model
    is put where none is chosen; in front of another one that has no norms its `last_norm` is put too.

    Args:
        model: a built `models.backbones.base.Backbone`.
        pool: makes a pool of (channels, map of the last stage, number of classes).
        head: makes a head of (features, number of classes).

    Raises:
        ValueError: the model is no classifier, its class attention has no use, or the pool brings a head of its own.
    """
    chosen = [name for name, part in (("pool", pool), ("head", head)) if part is not None]
    own_pool = getattr(model, "own_pool", None)
    if not chosen and own_pool is None:
        return
    if chosen:
        _check_classifies(model, chosen[0])
    dim, num_classes = model.pooled_dim, getattr(model.head, "out_features", 0)
    width, own = dim, None
    if (makes := pool or own_pool) is not None:
        model.pooling = makes(dim, model.pooled_grid, num_classes)
        _check_used(model)
        if own_pool is not None and not model.pooling.normalizes:
            model.norm = model.last_norm(dim)
        width, own = model.pooling.out_dim, model.pooling.own_head(num_classes)
    if own is not None and head is not None:
        raise UserError(
            f"head: {type(model.pooling).__name__} brings a classifier for each of its queries, got another head; "
            "leave head= out, or set pool.queries=1"
        )
    if width != dim and model.head_norm is not None:
        model.head_norm = model.last_norm(width)
    if getattr(model, "distill_head", None) is not None and (own is not None or head is not None or width != dim):
        model.distill_head = None  # the second one of a family that has two
    if own is not None:
        model.head = own
    elif head is not None and num_classes:
        model.head = head(width, num_classes)
    elif width != dim:
        model.head = classifier(width, num_classes).apply(init_weights)


def _check_classifies(model: nn.Module, what: str) -> None:
    if getattr(model, "generates", False):
        raise UserError(
            f"{what}: it is part of a model that names the class of an image, got {type(model).__name__}, which "
            f"generates images; leave {what}= out, or choose another model"
        )


def _check_used(model: nn.Module) -> None:
    """Refuses a pool of the map behind class attention, which makes of it what a class token asks for."""
    if getattr(model, "class_stage", None) is not None and model.pooling.reads_map:
        raise UserError(
            f"pool: the class attention of {type(model).__name__} ends in a class token, got "
            f"{type(model.pooling).__name__}, which reads the map; set model.class_token=false"
        )
