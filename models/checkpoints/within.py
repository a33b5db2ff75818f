"""A model that a configuration out of a file describes is built only as large as the weights it is meant for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from models.checkpoints.format.directory import MODEL, resolve
from models.checkpoints.format.door import Head, read_head
from models.checkpoints.format.parts import read_heads
from models.checkpoints.hub import fetch

if TYPE_CHECKING:  # a command line that only prints its help does not wait for torch
    from torch import nn

# parameters that are made and replaced again while a model is built
TIMES, MORE_TENSORS, MORE_NUMBERS = 4, 1000, 2**24


class TooLarge(UserError):
    """A configuration that describes a larger model than its weights are of."""


def built_within(path: str | os.PathLike, build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, after a look at it without memory: a depth of a million ends after a thousand parameters.

    Args:
        path: the weights, as for `load_weights`.
        build: makes the model; it is called twice.

    Raises:
        UserError: the model would be much larger than the weights.
    """
    import torch

    head = _head(path)
    if head is None:
        return build()
    with no_larger_than(head, path):
        try:
            with torch.device("meta"):
                build()
        except UserError:
            raise
        except Exception as error:  # not every model can be built without numbers
            if isinstance(cause := _cause(error), TooLarge):
                raise cause from None
        return build()


@contextmanager
def no_larger_than(head: Head, path: str | os.PathLike) -> Iterator[None]:
    """Within it a module that gets far more parameters or buffers than the file has ends with an error."""
    from torch.nn.modules import module

    left = [TIMES * len(head.shapes) + MORE_TENSORS, TIMES * head.numbers + MORE_NUMBERS]

    def count(owner: Any, name: str, value: Any) -> None:
        left[0] -= 1
        left[1] -= 0 if value is None else value.numel()
        if min(left) < 0:
            raise TooLarge(
                f"checkpoint: the configuration describes a larger model than the weights in {path} are of, which have "
                f"{len(head.shapes)} tensors with {head.numbers} numbers; it is not built"
            )

    with ExitStack() as hooks:
        for register in (
            module.register_module_parameter_registration_hook,
            module.register_module_buffer_registration_hook,
        ):
            handle = register(count)
            hooks.callback(handle.remove)
        yield


def _head(path: str | os.PathLike) -> Head | None:
    """Of the weights; None for files of torch, which carry no configuration."""
    place = fetch(path)
    if place.is_file() and place.name not in ("best", "last"):
        return read_head(place.resolve()) if place.suffix == ".safetensors" else None
    return read_heads(Path(resolve(place)), MODEL)


def _cause(error: BaseException) -> BaseException:
    """What began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
