"""Fused operations: what attention computes between its projections, in one or a few passes over memory.

One module per operation: definition, public function, reference in plain PyTorch, registration, and the shapes that
tests and benchmark use. The Triton kernels of an operation are in `triton.py` of its folder, so that nothing
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

# modules, in the order in which they are listed everywhere
OPERATIONS = (
    "depthwise_conv",
    "routed_attention",
    "window_attention",
    "channel_attention",
    "agent_attention",
    "linear_attention",
    "moh_attention",
    "aggregated_attention",
    "layer_norm",
)


def operations_of(module: str) -> tuple:
    """The `Operation`s that a module of this folder defines.

    Raises:
        ValueError: there is no such module.
    """
    if module not in OPERATIONS:
        raise ValueError(f"kernels: no operation is called {module}; choose from {', '.join(OPERATIONS)}")
    found = import_module(f"kernels.{module}")
    return getattr(found, "OPERATIONS", None) or (found.OPERATION,)
