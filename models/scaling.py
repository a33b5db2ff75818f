"""What a training costs on many GPUs and what limits it there, computed on paper from the speed of one.

Of n GPUs that share a global batch of G images each takes b = G / n, in as many passes as b needs at the batch that
fits, and

    step = busy + max(0, reduce − 2/3 · busy),   busy = max(b / rate, passes · launches),

since gradients are summed while the backward pass, two thirds of a step, goes on. All-reduce of S bytes takes
2 (k − 1)/k · S / inside on the k GPUs of a machine, and 2 (m − 1)/m · S / (k · between) between m machines, every GPU
sending its k-th part. Where loaders are slower than that, they are the step. Nothing is measured here.

Source: the cost of a ring, Patarasu and Yuan, 2009, "Bandwidth optimal all-reduce algorithms".
"""

from math import ceil
from typing import Any, NamedTuple

OVERLAP = 2 / 3  # of a step is its backward pass
STATES = 4  # copies of the weights in a checkpoint: raw, averaged, two moments
GRADIENT = 4  # bytes of a gradient, float32
REMEDIES = {
    "compute": "more GPUs",
    "launches": "task.compile=true (CUDA graphs), or a larger global_batch and its rate",
    "all-reduce": "trainer.gradient_compression=bf16, or a larger global_batch",
    "loader": "data.workers, smaller files, fewer GPUs per core",
}


class Machine(NamedTuple):
    """What the options of the probe say of the machines: see conf/probe/scale.yaml."""

    node: int
    inside: float
    between: float
    core_images: float
    cores: int
    launches: float  # seconds of a step


class Step(NamedTuple):
    """An optimizer step: `images` per GPU, its seconds by what takes them, and what is longest."""

    images: float
    compute: float
    launches: float
    reduce: float
    loader: float

    @property
    def seconds(self) -> float:
        busy = max(self.compute, self.launches)
        return max(busy + max(0.0, self.reduce - OVERLAP * busy), self.loader)

    @property
    def limit(self) -> str:
        if self.loader >= self.seconds:
            return "loader"
        if self.reduce > max(self.compute, self.launches):
            return "all-reduce"
        return "launches" if self.launches > self.compute else "compute"


def step_of(n: int, total: int, batch: int, rate: float, size: int, machine: Machine) -> Step:
    """A step of `total` images on n GPUs, of a model of so many parameters that one GPU trains at `rate`.

    Args:
        batch: images that a GPU takes at once at most.
    """
    share, on_node = total / n, min(n, machine.node)
    nodes = -(-n // machine.node)
    within = 2 * (on_node - 1) / on_node * GRADIENT * size / (machine.inside * 1e9)
    across = 2 * (nodes - 1) / nodes * GRADIENT * size / (on_node * machine.between * 1e9)
    loaded = share / (machine.core_images * machine.cores)
    return Step(share, share / rate, ceil(share / batch) * machine.launches, within + across if n > 1 else 0.0, loaded)


def row_of(
    n: int, step: Step, total: int, epochs: int, images: int, image_kb: float, first: Step, fewest: int
) -> dict[str, Any]:
    hours = epochs * (images // total) * step.seconds / 3600
    seen = total / step.seconds
    return {
        "gpus": n,
        "images_per_gpu": step.images,
        "step_ms": 1e3 * step.seconds,
        "compute_ms": 1e3 * step.compute,
        "launches_ms": 1e3 * step.launches,
        "all_reduce_ms": 1e3 * step.reduce,
        "loader_ms": 1e3 * step.loader,
        "hours": hours,
        "gpu_hours": hours * n,
        "efficiency": first.seconds * fewest / (step.seconds * n),
        "storage_mb_per_second": seen * image_kb / 1e3,
        "limit": step.limit,
        "setting": REMEDIES[step.limit],
    }
