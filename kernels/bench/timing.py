"""Time and memory on a GPU: medians with a cold cache, replays of CUDA graphs, peaks above the inputs, ceilings.

A graph of one call is captured and its replay timed in the same way as the call itself, so that the difference between
the two is what launching costs: the host's work that the device waits for.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kernels.bench.calls import PARTS, call_of


class Spread(NamedTuple):
    """Milliseconds: the median, and what a fifth of the calls stayed below and above."""

    median: float
    low: float
    high: float


class Timer(Protocol):
    """What rows of the tables are made with; tests have one that needs no GPU."""

    def time(self, function: Callable) -> Spread:
        """Of one call, with a cold cache."""

    def graph(self, function: Callable) -> Spread:
        """Of one replay of a CUDA graph of one call. RuntimeError if it cannot be captured."""

    def peak(self, function: Callable) -> int:
        """Largest number of bytes held during one call, beside what was held before it."""


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches: copying, in bytes read and written per second, and a bfloat16 product, in FLOP/s."""

    bandwidth: float
    matrix_rate: float


class CudaTimer:
    """Times with CUDA events.

    Args:
        milliseconds: how long each measurement repeats its call, after a quarter as much to warm up.
    """

    def __init__(self, milliseconds: int = 100) -> None:
        self.milliseconds = milliseconds

    def time(self, function: Callable) -> Spread:
        from triton.testing import do_bench

        median, low, high = do_bench(
            function, warmup=self.milliseconds // 4, rep=self.milliseconds, quantiles=[0.5, 0.2, 0.8]
        )
        return Spread(median, low, high)

    def graph(self, function: Callable) -> Spread:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = function()  # noqa: F841 its memory belongs to the graph
        return self.time(graph.replay)

    def peak(self, function: Callable) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def calibrate(timer: Timer) -> Ceilings:
    """Measures both ceilings on the current GPU: a copy of 4 GiB, and a product of 8192² matrices of random numbers."""
    source = torch.empty(min(4 * 2**30, torch.cuda.mem_get_info()[0] // 4), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = timer.time(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = timer.time(lambda: a @ b)
    return Ceilings(2 * source.numel() / copy.median * 1e3, 2 * 8192**3 / product.median * 1e3)


@dataclass
class Measured:
    """One way to compute an operation: milliseconds and bytes; None where it failed, or nothing has a gradient."""

    forward: Spread | None = None
    training: Spread | None = None
    forward_graph: Spread | None = None
    training_graph: Spread | None = None
    forward_peak: int | None = None
    training_peak: int | None = None
    note: str = ""


def measure(function: Callable, inputs: dict, timer: Timer) -> Measured:
    """Times `function(**inputs)`, without gradients and with them. What fails is a note, never an error."""
    found, calls = Measured(), {}
    for name in PARTS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = call_of(name, function, inputs)
                if call is None:
                    continue
                call()  # compiles, and allocates what stays
                setattr(found, f"{name}_peak", timer.peak(call))
                setattr(found, name, timer.time(call))
            calls[name] = call
        except torch.OutOfMemoryError:
            found.note = "out of memory"
        except Exception as error:  # a baseline that does not run here is a result too
            found.note = _first_line(error)
        if found.note:
            break
    for name, call in calls.items():
        try:
            setattr(found, f"{name}_graph", timer.graph(call))
        except Exception as error:
            found.note = found.note or f"no CUDA graph of {name}: {_first_line(error)}"
    _free()
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
