"""Which images a process reads: its place among those that share an epoch. Torch-free.

All processes do, unless the strategy says otherwise: where one image is spread over several, they read the same.
"""

from typing import Any


def readers(trainer: Any) -> int:
    """How many processes read different images; one where there is no trainer yet."""
    return 1 if trainer is None else _said(trainer).get("num_replicas") or trainer.world_size


def place(trainer: Any) -> tuple[int, int]:
    """The number of this process among those, and how many they are."""
    if trainer is None:
        return 0, 1
    said = _said(trainer)
    return said.get("rank", trainer.global_rank), readers(trainer)


def _said(trainer: Any) -> dict[str, int]:
    return getattr(trainer, "distributed_sampler_kwargs", None) or {}
