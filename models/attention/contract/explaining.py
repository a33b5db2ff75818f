"""What explain mode notes: the matrices of a forward pass, in the graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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


@contextmanager
def explaining() -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Matrices of forward passes inside are noted in what it gives."""
    notes: list[tuple[nn.Module, Tensor]] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)
