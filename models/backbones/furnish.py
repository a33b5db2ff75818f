"""What a built backbone is furnished with, where a paper changes another place than the attention.

The keys of `model` that every backbone takes besides its own; a group of conf/ gives the factory of each part.
"""

from typing import Any

from torch import nn

PLACES = frozenset(
    {
        "gate", "gate_at", "pool", "head", "reducer", "reparam", "initializer",
        "activation", "norm", "wiring", "downsample",
    }
)  # fmt: skip


def furnish(model: nn.Module, **places: Any) -> None:
    """Puts into a model what is chosen; None leaves it as it is."""
