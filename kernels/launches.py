"""The launches of an operation, recorded on fake tensors, and what Triton and the assembler make of them."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch, registration
from kernels.operation import Operation

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel with the types, constants and options that it was launched with."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that are multiples of 16
    warps: int
    stages: int
    registers: int | None = None  # at most, of a thread; as many as there are without


class Resources(NamedTuple):
    """What the assembler reports; spilled and shared in bytes."""

    registers: int
    spilled: int
    shared: int
    tensor_cores: str


def launches(operation: Operation, stages: list[str], dtype: torch.dtype) -> dict[Launch, str]:
    """Every distinct launch of forward and backward on these stages, with the first stage that makes it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[Launch, str] = {}
    for stage in stages:
        with FakeTensorMode(), recorded(found, stage), registration.launching_fakes(), fused_on_cpu():
            outputs = operation.run(**operation.inputs("cpu", dtype, **operation.stages[stage]), backend="triton")
            differentiable = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
            if differentiable:
                torch.autograd.backward(differentiable, [torch.ones_like(o) for o in differentiable])
    return found


@contextmanager
def recorded(found: dict[Launch, str], stage: str) -> Iterator[None]:
    """Launches inside are noted instead of run."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    JITFunction.run = lambda kernel, *given, **options: found.setdefault(launch_of(kernel, given, options), stage)
    try:
        yield
    finally:
        JITFunction.run = run


@contextmanager
def fused_on_cpu() -> Iterator[None]:
    before, dispatch.INTERPRETED = dispatch.INTERPRETED, True
    try:
        yield
    finally:
        dispatch.INTERPRETED = before


def launch_of(kernel: Any, arguments: tuple, options: dict) -> Launch:
    """Types and constants as the launcher specialises them: sizes of 1 are constants, multiples of 16 are known.

    But for parameters of which the kernel says that they change: each variant of it would be compiled in mid-run.
    """
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    named |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        value, changes = named[parameter.name], parameter.do_not_specialize
        one = value is not True and isinstance(value, int) and value == 1 and not changes
        if parameter.is_constexpr or value is None or one:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        signature.append((parameter.name, _type(value)))
        if not changes and not parameter.do_not_specialize_on_alignment and _is_aligned(value):
            aligned.append(i)
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(aligned), options["num_warps"], options["num_stages"],
        options.get("maxnreg"),
    )  # fmt: skip


def _is_aligned(value: Any) -> bool:
    """Whether it is a multiple of 16, or an address of that many bytes; memory as a whole starts at one."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.itemsize % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compiled(launch: Launch, target: str) -> Any:
    """What Triton makes of it for `target`, e.g. "sm_90"; kept on disk."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers}
    options |= {"enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", _number(target), 32), options=options)


def resources(launch: Launch, target: str) -> Resources:
    """What the assembler says of it for `target`."""
    from triton.backends.nvidia.compiler import get_ptxas

    made, arch = compiled(launch, target), _number(target)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(made.asm["ptx"])
        name = f"sm_{arch}a" if arch >= 90 else target
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(ptx), "-o", str(Path(folder, "kernel.cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled=int(spills[1]) + int(spills[2]),
        shared=made.metadata.shared,
        tensor_cores=tensor_cores(made.asm["ptx"]),
    )


def tensor_cores(ptx: str) -> str:
    """The instructions of a matrix unit among these; "-" if there are none."""
    return next((n for n, s in (("wgmma", "wgmma.mma"), ("mma", "mma.sync")) if s in ptx), "-")


def _number(target: str) -> int:
    return int(target.removeprefix("sm_"))
