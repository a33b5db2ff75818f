"""Runs the checks of operations, forward and backward, under the sanitizer.

    python -m kernels.sanitize [operation ...] [--dtype bfloat16] [--quick]

Exit status 1 if a launch does what a GPU would not forgive, 2 for a wrong argument.
"""

import argparse
import time

import torch
from torch import Tensor

import kernels
from kernels.operation import Operation
from kernels.sanitize.accesses import STORED_ALIKE, Finding
from kernels.sanitize.watching import watching

_SHARED = "programs that share tokens compute and store the same numbers, and read their own after a barrier"
KNOWN = {
    ("_state", "stats", STORED_ALIKE): _SHARED,
    ("_output", "stats", STORED_ALIKE): _SHARED,
    ("_backward_q", "pulls", STORED_ALIKE): _SHARED,
    ("_backward_k", "pulls", STORED_ALIKE): _SHARED,
}


def problems(operation: Operation, shape: dict, dtype: torch.dtype = torch.float32) -> list[Finding]:
    """What is wrong with the launches of forward and backward on this shape, less what is `KNOWN` to be right."""
    inputs = operation.inputs("cpu", dtype, **shape)
    with watching() as findings:
        outputs = operation.run(**inputs, backend="triton")
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
        outputs = [o for o in outputs if o.requires_grad]
        leaves = [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]
        if outputs and leaves:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)
    return [f for f in findings if (f.kernel, f.tensor, f.kind) not in KNOWN]


def arguments_of(line: list[str] | None) -> argparse.Namespace:
    """The command line; wrong names are one error."""
    parser = argparse.ArgumentParser(prog="python -m kernels.sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("operations", nargs="*", help="names; all without any")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="only the first check of each operation")
    chosen = parser.parse_args(line)
    try:
        chosen.operations = [o for name in chosen.operations or kernels.OPERATIONS for o in kernels.operations_of(name)]
    except ValueError as error:
        parser.error(str(error))
    return chosen


def main(line: list[str] | None = None) -> int:
    """Prints a row per check, and what is wrong below it; 1 if anything is."""
    chosen, failed = arguments_of(line), False
    for operation in chosen.operations:
        for name, shape in list(operation.checks.items())[: 1 if chosen.quick else None]:
            start = time.perf_counter()
            found = problems(operation, shape, getattr(torch, chosen.dtype))
            verdict = f"{len(found)} problems" if found else "clean"
            print(f"{operation.name:26} {verdict:12} {time.perf_counter() - start:5.1f} s  {name}", flush=True)
            for finding in found:
                print(f"    {finding}")
            failed |= bool(found)
    return int(failed)
