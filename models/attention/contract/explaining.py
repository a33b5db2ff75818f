"""What explain mode notes: the matrices of a forward pass, with their gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_notes: ContextVar[list[tuple[nn.Module, Tensor]] | None] = ContextVar("notes", default=None)


def is_explaining() -> bool:
    """Whether matrices are to be computed and noted."""
    return _notes.get() is not None


def note(mixer: nn.Module, matrix: Tensor) -> Tensor:
    """Notes a matrix of a mixer, whose gradient will be kept, and gives it back."""
    if matrix.requires_grad:
        matrix.retain_grad()
    _notes.get().append((mixer, matrix))
    return matrix


def grafted(mixer: nn.Module, matrix: Tensor, read: Callable[[Tensor], Tensor], o: Tensor) -> Tensor:
    """`o` as it is, and notes a matrix whose gradient is that of what it changes in `o`.

    So that mixers need not compute by way of it: what lies before it has its gradient through `o` alone.

    Args:
        mixer: the one that notes.
        matrix: its weights.
        read: what of `o` they give, shaped like it; values in it are to be detached.
        o: what the mixer has computed.
    """
    with torch.enable_grad():
        given = read(note(mixer, matrix.detach().requires_grad_()))
    return o + (given - given.detach()).to(o.dtype)


@contextmanager
def unnoted() -> Iterator[None]:
    """Inside, mixers compute as usual: one around them notes a matrix for all."""
    token = _notes.set(None)
    try:
        yield
    finally:
        _notes.reset(token)


@contextmanager
def explaining() -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Matrices of forward passes inside are noted in what it gives."""
    notes: list[tuple[nn.Module, Tensor]] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)
