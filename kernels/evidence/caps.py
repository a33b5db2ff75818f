"""What the floors leave room for at the stages of the benchmark: kernels/bench/caps.json.

    python -m kernels.compile [operation …] --caps     writes it anew for these or all; --quick: the first stage

For an H200, in bfloat16: microseconds predicted of the fused operation; `bandwidth`, the share of what copying reaches
that the least bytes then take, forward and backward; `cap`, the share that is left at full issue; how many times as
long the authors' way and plain PyTorch need at least, whose bytes are counted and cross at 0.85 of the bandwidth; and
`memory`, the counted peak as a share of the authors', forward and backward.
"""

import json
from pathlib import Path

import torch

import kernels
from kernels.bench.calls import PARTS, call_of
from kernels.bench.counting import count, launching
from kernels.evidence.chips import BANDWIDTH_REACHED, CHIPS
from kernels.evidence.roof import floors_of
from kernels.evidence.steps import Recorder, Step
from kernels.operation import Operation

FILE = Path(kernels.__file__).parent / "bench" / "caps.json"
CHIP = CHIPS["H200"]
COMPARED = {"official": PARTS, "pytorch": ("training",)}
DTYPE = torch.bfloat16

Caps = dict[str, float]


def write(operations: list[Operation], first: bool) -> None:
    """Replaces what the file says of these operations, stage by stage; the first of each first, or only that."""
    stages = [(o, [name for name, shape in o.stages.items() if shape["batch"] > 1]) for o in operations]
    work = [(o, name) for o, names in stages for name in names[:1]]
    work += [(o, name) for o, names in stages for name in names[1:] if not first]
    for operation, stage in work:
        caps = caps_of(operation, operation.stages[stage])
        print(operation.name, stage, caps, flush=True)
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        known.setdefault(operation.name, {})[stage] = caps
        FILE.write_text(_written(known))


def _written(known: dict[str, dict[str, Caps]]) -> str:
    """A line per stage, in the order of the cases; what is no operation or no stage any more is left out."""
    parts = []
    for operation in (o for module in kernels.OPERATIONS for o in kernels.operations_of(module)):
        caps = known.get(operation.name, {})
        lines = [f"    {json.dumps(name)}: {json.dumps(caps[name])}" for name in operation.stages if name in caps]
        parts += [f"  {json.dumps(operation.name)}: {{\n" + ",\n".join(lines) + "\n  }"] if lines else []
    return "{\n" + ",\n".join(parts) + "\n}\n"


def caps_of(operation: Operation, shape: dict) -> Caps:
    """Of one stage; a part that has no gradient is left out."""
    cost = operation.cost(DTYPE.itemsize, **shape)
    least = {"forward": cost.forward_bytes, "training": cost.forward_bytes + cost.backward_bytes}
    found: Caps = {}
    for part in PARTS:
        step = Step(operation.name, part)
        meter = recorded(operation, shape, part, step)
        if meter is None:
            continue
        predicted, floor = seconds(step)
        found[f"{part} us"] = round(predicted * 1e6, 1)
        found["bandwidth"] = round(least[part] / CHIP.bandwidth / predicted, 3)
        found["cap"] = round(min(1.0, least[part] / CHIP.bandwidth / floor), 3)
        for name in [name for name, parts in COMPARED.items() if part in parts and name in operation.baselines]:
            function = operation.baselines[name]
            theirs = count(lambda f=function, p=part: call_of(p, f, operation.inputs("cpu", DTYPE, **shape)))
            if theirs is not None:
                moved = theirs.bytes / CHIP.bandwidth / BANDWIDTH_REACHED
                found[f"{name} {part}"] = round(moved / predicted, 2)
                if (name, part) == ("official", "training"):
                    found["memory"] = round(meter.peak / theirs.peak, 3)
    return found


def recorded(operation: Operation, shape: dict, part: str, step: Step) -> Recorder | None:
    """Notes in `step` what the fused operation launches, forward or with its gradients; None without a gradient."""

    def fused(**inputs):
        return operation.run(**inputs, backend="triton")

    with Recorder(step) as meter, launching(meter):
        meter.counting = False
        call = call_of(part, fused, operation.inputs("cpu", DTYPE, **shape))
        meter.counting = True
        results = call() if call is not None else None  # noqa: F841 held until all is counted
    return meter if call is not None else None


def seconds(step: Step) -> tuple[float, float]:
    """Predicted, and the larger floor of every launch; PyTorch's own kernels in between are bound by memory."""
    outside = sum(size for size, _ in step.outside.values()) / CHIP.bandwidth
    floors = [(floors_of(launch, CHIP), times) for launch, times in step.launches.items()]
    predicted = sum(f.predicted * times for f, times in floors) + outside / BANDWIDTH_REACHED
    return predicted, sum(max(f.dram, f.issue) * times for f, times in floors) + outside
