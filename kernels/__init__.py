"""Fused operations: what attention computes between its projections, in one or a few passes over memory.

One module per operation: definition, public function, reference in plain PyTorch, registration, and the shapes that
tests and benchmark use. The Triton kernels of an operation are in `kernels/fused/` under the same name, so that nothing
imports Triton on a machine that has none. Imports torch and triton only: this folder and its tests run alone.

    from kernels.window_attention import window_attention
    o_BNC = window_attention(qkv_BNC, (56, 56), num_heads=3, window=(7, 7))      # fused on a GPU, PyTorch elsewhere

    with kernels.reference(): ...                       the definition in plain PyTorch, on any device
    TRITON_INTERPRET=1 python ...                       the fused kernels on a CPU, exact and slow
    python -m kernels.compile --target sm_90            registers, spills and shared memory of every kernel
    python -m kernels.bench                             checks, then times
"""

from importlib import import_module

from kernels.dispatch import reference as reference

OPERATIONS = (
    "depthwise_conv",
)


def operation(name: str):
    """The `Operation` of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in OPERATIONS:
        raise ValueError(f"kernels: no operation is called {name}; choose from {', '.join(OPERATIONS)}")
    return import_module(f"kernels.{name}").OPERATION
