"""Imports a package as if another that it would use were not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def load_timm() -> None:
    """Imports what a program uses of timm, which then does not import W&B."""
    with without("wandb"):
        import timm.utils  # noqa: F401


@contextmanager
def without(unwanted: str) -> Iterator[None]:
    """Within it `unwanted` cannot be found, unless it is imported already.

    timm imports W&B wherever it is installed, and cannot be imported where W&B is broken. A run keeps W&B in a process
    of its own (`models.loggers.wandb_process`), so nothing else here needs it.

    Args:
        unwanted: a package for which those that are imported can do without.
    """
    if unwanted in sys.modules:
        yield
        return
    sys.modules[unwanted] = None  # Python's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules[unwanted]
