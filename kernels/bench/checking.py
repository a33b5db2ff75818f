"""What must hold before an operation is timed: right in float32, as good as PyTorch in the timed dtype, and repeatable.

The truth is the definition in float64. `error` and `evaluate` say how results are compared everywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.bench.calls import tensors_of
from kernels.operation import Operation

Results = dict[str, Tensor]
CHOICES = 1e-3


def problems(operation: Operation, shape: dict, dtype: torch.dtype, device: str = "cuda", batch: int = 2) -> list[str]:
    """What is wrong with the fused path on a small batch of this shape; empty when nothing is.

    float32: 1e-5 relative in norm. `dtype`: twice the error of the definition computed in it, or one rounding. Both
    with fresh memory full of NaN. Twice the same: bit by bit. Whole numbers, such as the regions that were chosen: all
    but a few as in the definition, which rounds differently.
    """
    shape = {**shape, "batch": min(batch, shape["batch"])}

    def fused(**inputs):
        return operation.run(**inputs, backend="triton")

    wrong = []
    for kind in dict.fromkeys([torch.float32, dtype]):
        inputs = operation.inputs(device, kind, **shape)
        with exact_products():
            truth = evaluate(operation.reference, converted(inputs, torch.float64))
            definition = evaluate(operation.reference, inputs)
            with nan_filled_memory():
                found, again = evaluate(fused, inputs), evaluate(fused, inputs)
        for name, wanted in truth.items():
            if not wanted.is_floating_point():
                off, limit = (found[name] != definition[name]).double().mean().item(), CHOICES
            else:
                off = error(found[name], wanted)
                limit = (
                    1e-5 if kind == torch.float32 else max(2 * error(definition[name], wanted), torch.finfo(kind).eps)
                )
            if not off <= limit:
                wrong.append(f"{name} in {str(kind).removeprefix('torch.')}: error {off:.1e}, at most {limit:.1e}")
            if not torch.equal(found[name], again[name]):
                wrong.append(f"{name} in {str(kind).removeprefix('torch.')}: not the same twice")
    return wrong


def evaluate(function: Callable, inputs: dict, seed: int = 1) -> Results:
    """Outputs by number, and the gradients of a fixed random combination of them by the name of the input."""
    outputs = tensors_of(function(**inputs))
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    leaves = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    outputs = [o for o in outputs if o.requires_grad]
    if outputs and leaves:
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), directions)
        results |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results


def converted(inputs: dict, dtype: torch.dtype) -> dict:
    """The same with every floating tensor in `dtype`, as new leaves."""
    return {
        name: t.detach().to(dtype).requires_grad_(t.requires_grad)
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for name, t in inputs.items()
    }


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative in norm; NaN counts as infinite."""
    found, wanted = found.double(), wanted.double()
    distance = (found - wanted).norm() / wanted.norm() if wanted.norm() > 0 else found.norm()
    return float("inf") if distance.isnan() else distance.item()


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 is computed in float32 inside, not in TF32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [b.fp32_precision for b in backends]
    for b in backends:
        b.fp32_precision = "ieee"
    try:
        yield
    finally:
        for b, value in zip(backends, before, strict=True):
            b.fp32_precision = value


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """What `torch.empty` returns inside is full of NaN, or of the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
