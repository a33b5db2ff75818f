"""What tests, benchmark and ahead-of-time compilation know about an operation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from torch import Tensor


class Cost(NamedTuple):
    """The least work: bytes that must cross the memory bus when nothing is read or written twice, and FLOPs."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class Operation:
    """One operation.

    name: of the module.
    run: the public function; takes what `inputs` gives, and `backend`. With "torch" it is its definition in plain
        PyTorch, differentiable, for any floating dtype: `reference`.
    inputs: `(device, dtype, seed=0, **shape) -> keyword arguments`; tensors with a gradient require it already.
    checks: small awkward shapes by name, for the tests.
    stages: the papers' stages by name, for the benchmark and for ahead-of-time compilation.
    baselines: other ways to compute the same, by name; each takes what `inputs` gives. "official": as the authors'
        code does it; "pytorch": the best that plain PyTorch has, mostly the reference; "sdpa": dense attention on as
        many tokens, which computes something else and is there to be compared with.
    cost: `(itemsize, **shape) -> Cost`, the fused model.
    """

    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[..., dict]
    checks: Mapping[str, dict]
    stages: Mapping[str, dict]
    cost: Callable[..., Cost]
    baselines: Mapping[str, Callable] = field(default_factory=dict)

    @property
    def reference(self) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        return in_pytorch(self.run)


def in_pytorch(run: Callable) -> Callable:
    """A public function on its definition, whatever the device."""
    return partial(run, backend="torch")
