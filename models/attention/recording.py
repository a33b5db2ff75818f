"""What the mixers of a model are given in a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.attention import mixers_of
from models.attention.contract import Grid


class Tokens(NamedTuple):
    """Tokens (B, N, C), and their map."""

    x_BNC: Tensor
    grid: Grid


class Call(Tokens):
    """What a mixer was given: tokens and map, and beside these `carry`, where the block before it handed one on."""

    carry: Any = None

    @property
    def named(self) -> dict[str, Any]:
        """What its matrix depends on besides."""
        return {} if self.carry is None else {"carry": self.carry}


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Call]]:
    """Inside, forward passes note the input of every outermost mixer by its name, in the order in which they come.

    The last pass is the one that counts.

        with recorded(model) as calls:
            model(images)
    """
    calls: dict[str, Call] = {}
    handles = [
        mixer.register_forward_pre_hook(partial(_note, calls, name), with_kwargs=True)
        for name, mixer in mixers_of(model)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _note(calls: dict[str, Call], name: str, mixer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    x_BNC = given[0] if given else named["x_BNC"]
    calls[name] = Call(x_BNC, given[1] if len(given) > 1 else named["grid"])
    calls[name].carry = named.get("carry")
