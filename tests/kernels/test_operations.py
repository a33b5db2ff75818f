"""Every fused operation against its definition, and inside everything that PyTorch wraps around an operation.

On a machine without a GPU the kernels are interpreted: exact, and slow, so the shapes are small.
"""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATIONS = {o.name: o for module in kernels.OPERATIONS for o in kernels.operations_of(module)}
# `make test` has the first three checks of an operation and the last, the largest; `make test-all` all of them
CASES = [
    pytest.param(o, shape, id=f"{o.name}: {name}", marks=[] if n < 3 or n == len(o.checks) - 1 else pytest.mark.full)
    for o in OPERATIONS.values()
    for n, (name, shape) in enumerate(o.checks.items())
]
# the first check of each operation is the one that is cheap and typical
TYPICAL = [pytest.param(o, next(iter(o.checks.values())), id=o.name) for o in OPERATIONS.values()]
# what PyTorch wraps around an operation is the same for all of them, and an interpreter runs programs in turn: those
# with the most kernels follow in test-all, and clipped attention, which shares those of sigmoid attention
LATER = ("agent_attention", "focused_linear_attention", "aggregated_attention", "inline_attention", "routed_attention")
LATER += ("conv_norm", "neighborhood_attention", "clipped_attention")
WRAPPED = [pytest.param(*p.values, id=p.id, marks=[pytest.mark.full] if p.id in LATER else []) for p in TYPICAL]
HALF = [torch.float16, torch.bfloat16]
# `make test` has three checks of an operation, in the two types by turns: all of them take a third of its time
IN_HALF = [
    pytest.param(o, shape, dtype, id=f"{o.name}: {name}-{dtype}", marks=[] if turn else pytest.mark.full)
    for o in OPERATIONS.values()
    for number, (name, shape) in enumerate(o.checks.items())
    for dtype, turn in zip(HALF, (number in (0, 2), number == 1), strict=True)
]


def tensors(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def floating(outputs) -> list[Tensor]:
    return [o for o in tensors(outputs) if o is not None and o.is_floating_point()]


def run(function, inputs: dict, seed: int = 1, directions: list[Tensor] | None = None):
    """Outputs, and the gradients of a fixed random combination of them, unless `directions` gives another."""
    outputs = floating(function(**inputs))
    leaves = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    with_gradient = [o for o in outputs if o.requires_grad]
    if not with_gradient:
        return outputs, {}
    directions = random_directions(with_gradient, seed) if directions is None else directions
    gradients = torch.autograd.grad(with_gradient, list(leaves.values()), directions)
    return [o.detach() for o in outputs], dict(zip(leaves, gradients, strict=True))


def random_directions(outputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator).to(o) for o in outputs]


def converted(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        name: t.detach().to(dtype).requires_grad_(t.requires_grad)
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for name, t in inputs.items()
    }


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative in norm; NaN counts as infinite."""
    found, wanted = found.double(), wanted.double()
    distance = (found - wanted).norm() / wanted.norm().clamp_min(1e-30) if wanted.norm() > 0 else found.norm()
    return float("inf") if distance.isnan() else distance.item()


def compared(found, wanted) -> dict[str, float]:
    errors = {f"output {i}": error(a, b) for i, (a, b) in enumerate(zip(found[0], wanted[0], strict=True))}
    return errors | {name: error(found[1][name], wanted[1][name]) for name in wanted[1]}


@pytest.mark.parametrize(("operation", "shape"), CASES)
def test_equals_the_definition(operation, shape, poisoned):
    """1e-5 is a dozen roundings of float32; gradients that are sums which cancel get as much of the largest part."""
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    wanted = run(operation.reference, converted(inputs, torch.float64))
    errors = compared(run(operation.run, inputs), wanted)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("operation", "shape", "dtype"), IN_HALF)
def test_half_precision_is_no_worse_than_pytorch(operation, shape, dtype, poisoned):
    """Twice the error of the definition in the same dtype, or two roundings: both are measured against float64."""
    inputs = operation.inputs(DEVICE, dtype, **shape)
    wanted = run(operation.reference, converted(inputs, torch.float64))
    errors = compared(run(operation.run, inputs), wanted)
    eager = compared(run(operation.reference, inputs), wanted)
    worse = {name: (e, eager[name]) for name, e in errors.items() if e > max(2 * eager[name], torch.finfo(dtype).eps)}
    assert not worse, worse


@pytest.mark.parametrize(("operation", "shape"), WRAPPED)
def test_is_the_same_every_time(operation, shape):
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    first, second = run(operation.run, inputs), run(operation.run, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize(("operation", "shape"), WRAPPED)
def test_takes_strided_inputs(operation, shape):
    """Activations may be parts of wider tensors, and their channels need not be next to each other."""
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    wanted = run(operation.run, inputs)
    for spread in (_part_of_wider, _channels_apart):
        moved = {name: spread(t) if isinstance(t, Tensor) else t for name, t in inputs.items()}
        found = run(operation.run, moved)
        errors = compared(found, wanted)
        assert max(errors.values()) < 1e-6, (spread.__name__, errors)


def _part_of_wider(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 16), 97, dtype=t.dtype, device=t.device)
    wide[..., : t.shape[-1]] = t.detach()
    return wide[..., : t.shape[-1]].detach().requires_grad_(t.requires_grad)


def _channels_apart(t: Tensor) -> Tensor:
    if t.dim() < 2:
        return t
    return t.detach().mT.contiguous().mT.requires_grad_(t.requires_grad)


@pytest.mark.parametrize(("operation", "shape"), WRAPPED)
def test_passes_opcheck(operation, shape):
    """Schema, fake implementation and tracing of every operator, with the arguments of the public function."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.namespace == "vision_kernels":
                calls.append((function, arguments, keywords or {}))
            return function(*arguments, **(keywords or {}))

    with Record():
        run(operation.run, operation.inputs(DEVICE, torch.float32, **shape))
    assert calls, "the public function calls no registered operator"
    for function, arguments, keywords in {call[0]: call for call in calls}.values():
        detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        torch.library.opcheck(function, detached, keywords)


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static", marks=pytest.mark.full), pytest.param(True, id="dynamic")]
)
@pytest.mark.parametrize(("operation", "shape"), WRAPPED)
def test_compiles_into_one_graph(operation, shape, dynamic):
    torch._dynamo.reset()
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    compiled = torch.compile(operation.run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    errors = compared(run(compiled, inputs), run(operation.run, inputs))
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize(("operation", "shape"), TYPICAL)
def test_works_under_autocast(operation, shape):
    """float32 inputs are computed in bfloat16, as PyTorch's own attention is, and gradients come back in float32."""
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    wanted = run(operation.reference, converted(inputs, torch.float64))

    def under_autocast(**inputs):
        with torch.autocast(DEVICE, torch.bfloat16):
            return operation.run(**inputs)

    found = run(under_autocast, inputs)
    assert all(g.dtype == torch.float32 for g in found[1].values())
    errors = compared(found, wanted)
    assert max(errors.values()) < 0.05, errors


@pytest.mark.parametrize(("operation", "shape"), WRAPPED)
def test_works_under_activation_checkpointing_and_without_gradient(operation, shape):
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    wanted = run(operation.run, inputs)
    found = run(lambda **i: checkpoint(operation.run, use_reentrant=False, **i), inputs)
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])
    with torch.no_grad():
        without = floating(operation.run(**inputs))
    assert not any(o.requires_grad for o in without)
    assert all(torch.equal(a, b) for a, b in zip(without, wanted[0], strict=True))


@pytest.mark.parametrize(("operation", "shape"), TYPICAL)
def test_counts_the_flops_of_its_cost(operation, shape):
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    cost = operation.cost(4, **shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        operation.run(**inputs)
    assert counter.get_total_flops() == pytest.approx(cost.forward_flops, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        run(operation.run, inputs)
    assert counter.get_total_flops() == pytest.approx(cost.forward_flops + cost.backward_flops, rel=0.02)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_takes_an_empty_batch(operation):
    shape = {**next(iter(operation.checks.values())), "batch": 0}
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    outputs, gradients = run(operation.run, inputs)
    with torch.no_grad():  # PyTorch's attention loses the gradient of its bias on an empty batch
        wanted = floating(operation.reference(**inputs))
    assert [o.shape for o in outputs] == [o.shape for o in wanted]
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize(("operation", "shape"), TYPICAL)
def test_reference_and_backends_choose_the_path(operation, shape, monkeypatch):
    calls = []
    # every fused path starts with this check, and no reference has it
    module = import_module(operation.run.__module__.removesuffix(".cases"))
    check = dispatch.check_tensors
    monkeypatch.setattr(module, "check_tensors", lambda *a, **k: calls.append(a) or check(*a, **k))
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    operation.run(**inputs)
    operation.run(**inputs, backend="triton")
    assert len(calls) == 2
    operation.run(**inputs, backend="torch")
    with kernels.reference():
        operation.run(**inputs, backend="triton")
    assert len(calls) == 2
    with pytest.raises(ValueError, match="backend must be auto, triton, torch, got cuda; choose one of them"):
        operation.run(**inputs, backend="cuda")


@pytest.mark.parametrize(("operation", "shape"), TYPICAL)
def test_refuses_what_no_kernel_takes(operation, shape, monkeypatch):
    with pytest.raises(ValueError, match=r"the kernels take float32, float16 and bfloat16, got .* in float64; cast it"):
        operation.run(**converted(operation.inputs(DEVICE, torch.float32, **shape), torch.float64))
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    first, *others = (name for name, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point())
    with pytest.raises(ValueError, match=r"take plain tensors, got one inside of torch\.func .*; use backend=torch"):
        torch.func.grad(lambda tensor: operation.run(**{**inputs, first: tensor}))(inputs[first].detach())
    if others:
        with pytest.raises(ValueError, match=r"all tensors must be on one device, got .* on meta"):
            operation.run(**{**inputs, others[0]: inputs[others[0]].detach().to("meta")})
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="backend=triton needs CUDA tensors, got cpu; use backend=auto"):
            operation.run(**inputs, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(("operation", "shape"), TYPICAL)
def test_replays_in_a_cuda_graph(operation, shape):
    """Forward and backward, with the same bits as launched one by one."""
    inputs = operation.inputs(DEVICE, torch.bfloat16, **shape)
    directions = random_directions([o for o in floating(operation.run(**inputs)) if o.requires_grad])
    wanted = run(operation.run, inputs, directions=directions)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(operation.run, inputs, directions=directions)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients = run(operation.run, inputs, directions=directions)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted[0], strict=True))
    assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted[1].items())
