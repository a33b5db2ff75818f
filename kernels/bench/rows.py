"""One row per operation and stage: timed on a GPU, or counted from the graph."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.bench.checking import problems
from kernels.bench.counting import Counted, count_operation
from kernels.bench.targets import Target, target_of
from kernels.bench.timing import Ceilings, Measured, Timer, measure
from kernels.operation import Cost, Operation

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class Row:
    """What is known of an operation at a stage; `cost` is the fused model, `wrong` what kept it from being timed."""

    operation: str
    stage: str
    dtype: str
    cost: Cost
    target: Target | None
    timed: dict[str, Measured] = field(default_factory=dict)
    counted: dict[str, dict[str, Counted | None]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.stage}"

    def least_bytes(self, part: str) -> int:
        return self.cost.forward_bytes + (self.cost.backward_bytes if part == "training" else 0)

    def least_flops(self, part: str) -> int:
        return self.cost.forward_flops + (self.cost.backward_flops if part == "training" else 0)

    def milliseconds(self, variant: str, part: str) -> float | None:
        spread = getattr(self.timed.get(variant), part, None)
        return spread and spread.median

    def times_faster(self, baseline: str, part: str) -> float | None:
        """Than a baseline; "sdpa" means the fastest backend of it."""
        theirs, ours = self.milliseconds(self.fastest(baseline, part), part), self.milliseconds("fused", part)
        return theirs / ours if theirs and ours else None

    def fastest(self, baseline: str, part: str) -> str:
        """The variant of this name that took the least time, e.g. "sdpa flash" of "sdpa"."""
        names = [n for n in self.timed if n == baseline or (n.startswith("sdpa ") and baseline == "sdpa")]
        return min(names, key=lambda n: self.milliseconds(n, part) or float("inf"), default=baseline)

    def memory_share(self, baseline: str = "official") -> float | None:
        """Our peak over theirs, forward and backward; of what was timed, or else counted."""
        if self.timed:
            peaks = [m.training_peak for n in ("fused", baseline) if (m := self.timed.get(n)) and m.training_peak]
        else:
            peaks = [c.peak for n in ("fused", baseline) if (c := self.counted.get(n, {}).get("training"))]
        return peaks[0] / peaks[1] if len(peaks) == 2 else None

    def bandwidth_share(self, part: str, ceilings: Ceilings) -> float | None:
        ms = self.milliseconds("fused", part)
        return ms and self.least_bytes(part) / (ms * 1e-3) / ceilings.bandwidth

    def matrix_share(self, part: str, ceilings: Ceilings) -> float | None:
        ms = self.milliseconds("fused", part)
        return ms and self.least_flops(part) / (ms * 1e-3) / ceilings.matrix_rate

    def missed(self, ceilings: Ceilings) -> list[str]:
        """The parts of the target that were measured and not reached."""
        if self.target is None or not self.timed:
            return []
        t, faster = self.target, self.times_faster
        share, memory = self.bandwidth_share("training", ceilings), self.memory_share()
        checks = [
            ("official forward", faster("official", "forward"), t.forward),
            ("official training", faster("official", "training"), t.training),
            ("pytorch", faster("pytorch", "training"), t.pytorch),
            ("memory", 1 / memory if memory else None, 1 / t.memory if t.memory else None),
            ("bandwidth", share, t.bandwidth),
        ]
        return [
            f"{name} {found:.2g} < {wanted:.2g}"
            for name, found, wanted in checks
            if found and wanted and found < wanted
        ]


def new_row(operation: Operation, stage: str, dtype: torch.dtype) -> Row:
    shape = operation.stages[stage]
    return Row(
        operation.name,
        stage,
        str(dtype).removeprefix("torch."),
        operation.cost(dtype.itemsize, **shape),
        target_of(operation.name, stage, shape["batch"]),
    )


def counted_row(operation: Operation, stage: str, dtype: torch.dtype) -> Row:
    row = new_row(operation, stage, dtype)
    row.counted = count_operation(operation, operation.stages[stage], dtype)
    return row


def timed_row(
    operation: Operation, stage: str, dtype: torch.dtype, timer: Timer, *, compiled: bool = True, device: str = "cuda"
) -> Row:
    """Checks, then times every way to compute it; only what is wrong if the check fails."""
    row, shape = new_row(operation, stage, dtype), operation.stages[stage]
    try:
        row.wrong = problems(operation, shape, dtype, device)
        inputs = operation.inputs(device, dtype, **shape)
    except Exception as error:
        row.wrong = [f"could not be checked: {type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    if row.wrong:
        return row
    for name, function in variants(operation, compiled).items():
        row.timed[name] = measure(function, inputs, timer)
    return row


def variants(operation: Operation, compiled: bool) -> dict[str, Callable]:
    """Every way to compute it, by name: "fused", the baselines, sdpa per backend, and the authors' way compiled."""

    def fused(**inputs):
        return operation.run(**inputs, backend="triton")

    found = {"fused": fused}
    for name, function in operation.baselines.items():
        if name == "sdpa":
            found |= {f"sdpa {label}": _with_backend(function, backend) for label, backend in SDPA.items()}
        else:
            found[name] = function
    if compiled and "official" in operation.baselines:
        torch._dynamo.reset()
        found["official compiled"] = torch.compile(operation.baselines["official"], dynamic=False)
    return found


def _with_backend(function: Callable, backend: SDPBackend) -> Callable:
    def run(**inputs):
        with sdpa_kernel(backend):
            return function(**inputs)

    return run
