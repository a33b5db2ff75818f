"""What is put around a built backbone, see `models.layers.wrapped`."""

from collections.abc import Callable

from torch import nn

from conf.errors import UserError
from models.layers.wrapped import Wrapper


def put_wrapper(model: nn.Module, wrapper: Callable[[nn.Module], Wrapper] | None) -> None:
    """A wrapper around the stages of a model; None for none.

    Raises:
        ValueError: a model that makes images, or what the wrapper refuses.
    """
    if wrapper is None:
        return
    if not hasattr(model, "through") or getattr(model, "generates", False):
        raise UserError(
            f"wrapper: it stands around a model that images go through, got {type(model).__name__}; leave wrapper= out"
        )
    model.wrapper = wrapper(model)
