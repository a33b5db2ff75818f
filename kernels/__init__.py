"""Fused operations: what attention computes between its projections, in one or a few passes over memory.

One folder per operation: `__init__` has the public function and its `definition` in plain PyTorch, on heads, which the
mechanisms of models/ call too; `register` its operators; `triton` its kernels, which are imported when a fused path
first runs, so that nothing imports Triton on a machine that has none; `cases` the shapes that tests and benchmark use.
`heads` and `windows` are the layouts that definitions share, `device/` what kernels share and how they are launched.
Imports torch and triton only: this folder and its tests run alone.

    from kernels.window_attention import window_attention
    o_BNC = window_attention(qkv_BNC, (56, 56), num_heads=3, window=(7, 7))      # fused on a GPU, PyTorch elsewhere

    with kernels.reference(): ...                       the definition in plain PyTorch, on any device
    TRITON_INTERPRET=1 python ...                       the fused kernels on a CPU, exact and slow
    python -m kernels.compile --target sm_90            registers, spills and shared memory of every kernel
    python -m kernels.sanitize window_attention         races, and accesses outside of tensors, found by interpreting
    python -m kernels.bench                             checks, then times
"""

from importlib import import_module
from pathlib import Path

from kernels.dispatch import reference as reference

# the folders that have cases, in the order in which they are listed everywhere
OPERATIONS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/cases.py")))


def operations_of(module: str) -> tuple:
    """The `Operation`s of a folder of this one.

    Raises:
        ValueError: there is no such folder.
    """
    if module not in OPERATIONS:
        raise ValueError(f"kernels: no operation is called {module}; choose from {', '.join(OPERATIONS)}")
    cases = import_module(f"kernels.{module}.cases")
    return getattr(cases, "OPERATIONS", None) or (cases.OPERATION,)
