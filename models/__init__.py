"""Attention mechanisms, backbones, tasks, checkpoints and probes; and the three functions that a library user needs."""

from typing import TYPE_CHECKING, Any

from conf import moved

if TYPE_CHECKING:
    from torch import nn

moved.install()


def create_model(
    name: str, attention: str | None = None, *, features_only: bool = False, **settings: Any
) -> "nn.Module":
    """A model by name, with random weights: `create_model("swin_tiny", attention="agent", image_size=256)`.

    Args:
        name: a row of a table in conf/model, see `list_models()`; or `timm/<name>`, any model of timm.
        attention: a file of conf/attention, see `list_attentions()`; None for the model's own.
        features_only: return the maps (B, C, H, W) of all stages instead of logits, without the classifier; the
            module says their `channels` and `strides`.
        settings: other values for the keys of the model, e.g. `num_classes=10, drop_path=0.1`, and of
            conf/attention/<attention>.yaml, e.g. `num_regions=8`, or `first={"kernel_size": 5}` in a plan; `image_size`
            in pixels, one number or (height, width). `num_classes` is 1000 unless given.

    Raises:
        ValueError: an unknown name or key (the message has the nearest ones), or a mechanism that does not fit.
    """
    from models.factory import create

    return create(name, attention, settings, features_only)


def list_models() -> list[str]:
    """The names that `create_model` and `model=` take."""
    from conf import families

    return list(families.models())


def list_attentions() -> list[str]:
    """The mechanisms that `attention=` takes; it also takes plans, `plan/<name>`, that combine two of them."""
    from conf.names import options

    return [name for name in options("attention") if "/" not in name]
