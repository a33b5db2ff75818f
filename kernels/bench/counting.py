"""What a computation moves, holds and launches, counted from its graph: on any machine, at full size, repeatably.

Tensors are fake: they have shapes and no data. Every operator of PyTorch that is no view is one kernel, which reads
every distinct tensor it is given and writes what it returns; a launch of a Triton kernel is one that touches each of
its arguments once. Caches are not modelled, and an operator that is several kernels inside (backward of a convolution)
counts as one, so what PyTorch needs is rather counted too low than too high.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kernels import dispatch, registration
from kernels.bench.calls import PARTS, call_of
from kernels.operation import Operation

# allocate, and leave the memory as it is
ALLOCATE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
# write into their first argument without reading it
OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "exponential_", "random_"}
# read of their first argument only what they return
SELECT = {"gather", "index", "index_select", "embedding", "_unsafe_index"}
# change of their first argument only as much as they are given
SCATTER = {"scatter_add_", "scatter_", "index_put_", "index_add_", "_index_put_impl_"}


@dataclass(frozen=True)
class Counted:
    """Bytes moved, most bytes held at a time beside the inputs, kernels, and FLOPs of products and convolutions."""

    bytes: int
    peak: int
    kernels: int
    flops: int


class Meter(FakeTensorMode):
    """A fake tensor mode that counts what runs in it while `counting`."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.bytes = self.peak = self.held = self.kernels = self.flops = 0
        self.counting, self._inside = True, False
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.counting and function is torch.ops.aten._local_scalar_dense.default:
            return 0  # models look at a few numbers while they are built
        if self._inside:  # how another operator works out its result
            return super().__torch_dispatch__(function, types, args, kwargs)
        if function.namespace == registration.NAMESPACE and registration._launching:  # its parts are counted one by one
            out = super().__torch_dispatch__(function, types, args, kwargs)
            self.flops += _flops(function, args, kwargs, out) if self.counting else 0
            return out
        self._inside = True
        try:
            out = super().__torch_dispatch__(function, types, args, kwargs)
        finally:
            self._inside = False
        if self.counting:
            self._count(function, args, kwargs, out)
        return out

    def launched(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        """Counts a launch of a Triton kernel."""
        if self.counting:
            self.bytes += touched(arguments)
            self.kernels += 1

    def result(self) -> Counted:
        return Counted(self.bytes, self.peak, self.kernels, self.flops)

    def _count(self, function, args, kwargs, out) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in results if t.untyped_storage()._cdata not in storages]
        written = [
            t
            for i, argument in enumerate(function._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
            if isinstance(t, Tensor)
        ]
        for t in fresh:
            self._hold(t)
        name = function._schema.name.removeprefix("aten::")
        if name in ALLOCATE or not (fresh or written):
            return
        self.bytes += _moved(name, given, written, fresh)
        self.kernels += 1
        self.flops += _flops(function, args, kwargs, out)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            self.held -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self.held += size
        self.peak = max(self.peak, self.held)


def _extent(t: Tensor) -> int:
    """Bytes of the distinct elements: what is expanded is read once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * t.itemsize


def _distinct(tensors: list[Tensor]) -> dict[tuple, int]:
    return {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): _extent(t) for t in tensors}


def touched(arguments: tuple) -> int:
    """Bytes of the tensors that a launch is given, each once."""
    return sum(_distinct([a for a in arguments if isinstance(a, Tensor)]).values())


def _moved(name: str, given: list[Tensor], written: list[Tensor], fresh: list[Tensor]) -> int:
    if name in SCATTER:  # reads what it is given, and reads and writes as many elements of the target
        more = sum(_distinct(given[1:]).values())
        return more + 2 * min(_extent(given[0]), _extent(given[-1]))
    read = _distinct([t for t in given if not (name in OVERWRITE and t is given[0])])
    total = sum(read.values())
    if name in SELECT:
        first = _extent(given[0])
        total += min(first, sum(_extent(t) for t in fresh)) - first
    return total + sum(_extent(t) for t in (*written, *fresh))


def _flops(function, args, kwargs, out) -> int:
    if function._overloadpacket is torch.ops.aten.convolution_backward:
        # PyTorch's formula leaves the groups out of the weight's part
        grad, weight, mask = args[0], args[2], args[10]
        return 2 * grad.numel() * weight[0].numel() * (mask[0] + mask[1])
    formula = flop_registry.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula is not None else 0


@contextmanager
def launching(meter: Meter) -> Iterator[None]:
    """Fused operations inside reach their launch functions, and the launches are counted instead of run."""
    from triton.runtime.jit import KernelInterface

    def noted(kernel, grid):
        return lambda *arguments, **options: meter.launched(kernel, grid, arguments, options)

    select, before = KernelInterface.__getitem__, dispatch.INTERPRETED
    KernelInterface.__getitem__, dispatch.INTERPRETED = noted, True
    try:
        with registration.launching_fakes():
            yield
    finally:
        KernelInterface.__getitem__, dispatch.INTERPRETED = select, before


def count(prepare: Callable[[], Callable | None], *, fused: bool = False) -> Counted | None:
    """Counts the call that `prepare()` returns, with Triton kernels where `fused`; preparing it is not counted.

    None where there is no call, or where the work depends on numbers, which fake tensors do not have.
    """
    with Meter() as meter, launching(meter) if fused else nullcontext():
        meter.counting = False
        try:
            call = prepare()
            if call is None:
                return None
            meter.counting = True
            results = call()  # noqa: F841 held until all is counted
        except DataDependentOutputException:
            return None
        return meter.result()


def count_operation(operation: Operation, shape: dict, dtype: torch.dtype) -> dict[str, dict[str, Counted | None]]:
    """Of every way to compute the operation, by name: {"forward": ..., "training": ...}."""

    def fused(**inputs):
        return operation.run(**inputs, backend="triton")

    def counted(function: Callable, part: str) -> Counted | None:
        return count(lambda: call_of(part, function, operation.inputs("cpu", dtype, **shape)), fused=function is fused)

    ways = {"fused": fused, **operation.baselines}
    return {name: {part: counted(function, part) for part in PARTS} for name, function in ways.items()}
