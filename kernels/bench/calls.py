"""The calls that are timed and counted: forward without gradients, and forward with the gradients of all inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

PARTS = ("forward", "training")


def call_of(part: str, function: Callable, inputs: dict) -> Callable | None:
    """`function(**inputs)` as a call without arguments; None for "training" where nothing has a gradient.

    The gradients of the outputs are made here, outside of the call.
    """
    if part == "forward":
        return torch.no_grad()(lambda: function(**inputs))
    leaves = [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]

    def outputs() -> list[Tensor]:
        return [o for o in tensors_of(function(**inputs)) if o.requires_grad]

    seeds = [torch.randn_like(o) for o in outputs()]
    if not (leaves and seeds):
        return None
    return lambda: torch.autograd.grad(outputs(), leaves, seeds, allow_unused=True)


def tensors_of(outputs) -> list[Tensor]:
    """The tensors that an operation returns; some return None for a part that was not asked for."""
    return [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
