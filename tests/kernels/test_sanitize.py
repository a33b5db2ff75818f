"""The sanitizer finds what is planted, and nothing in the kernels beside what is known."""

import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels import dispatch
from kernels.sanitize import accesses, command
from kernels.sanitize.accesses import Memory
from kernels.sanitize.watching import _Watch, watching

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="on a GPU the kernels are not interpreted")
OPERATIONS = {o.name: o for module in kernels.OPERATIONS for o in kernels.operations_of(module)}
# tiles of a map, sums over a list, and the one operation whose programs talk to themselves through memory
SAMPLE = ("depthwise_conv", "region_routing", "focused_linear_attention")


@triton.jit
def _clean(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N, other=0.0) + tl.load(y + i, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def _reads_too_far(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i <= N, other=0.0), mask=i < N)


@triton.jit
def _stores_too_far(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N, other=0.0), mask=i <= N)


@triton.jit
def _forgets_other(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N), mask=i < N)


@triton.jit
def _stores_where_all_do(x, y, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) + tl.program_id(0))


@triton.jit
def _stores_the_same_where_all_do(x, y, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def _stores_twice_at_once(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i // 2, tl.load(x + i, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def _moves_in_place(x, y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(y + i + 1, mask=i + 1 < N, other=0.0), mask=i < N)


@triton.jit
def _reads_its_own(x, y, N, BLOCK: tl.constexpr, WAIT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < N, other=0.0), mask=i < N)
    if WAIT:
        tl.debug_barrier()
    turned = tl.program_id(0) * BLOCK + (BLOCK - 1 - tl.arange(0, BLOCK))
    tl.store(x + i, tl.load(y + turned, mask=turned < N, other=0.0), mask=i < N)


@triton.jit
def _adds_at_once(x, y, N, BLOCK: tl.constexpr):
    tl.atomic_add(y, 1.0)


PLANTED = {
    "nothing": (_clean, set()),
    "a load past the end": (_reads_too_far, {("x", accesses.OUTSIDE_LOAD)}),
    "a store past the end": (_stores_too_far, {("y", accesses.OUTSIDE_STORE)}),
    "a masked load without other": (_forgets_other, {("x", accesses.UNFILLED)}),
    "a race": (_stores_where_all_do, {("y", accesses.STORED_BY_MORE)}),
    "a race of equals": (_stores_the_same_where_all_do, {("y", accesses.STORED_ALIKE)}),
    "a store with a place twice": (_stores_twice_at_once, {("y", accesses.STORED_TWICE)}),
    "a shift in place": (_moves_in_place, {("y", accesses.READ_FROM_ANOTHER), ("y", accesses.OVERWRITTEN)}),
    "an atomic": (_adds_at_once, {("y", accesses.ATOMIC)}),
}


def found(kernel, x: torch.Tensor, y: torch.Tensor, **constants) -> set[tuple[str, str]]:
    with watching() as findings:
        kernel[2,](x, y, len(x), BLOCK=4, **constants)
    assert all(f.kernel == kernel.__name__ and f.count > 0 for f in findings)
    return {(f.tensor, f.kind) for f in findings}


@pytest.mark.parametrize(("kernel", "expected"), PLANTED.values(), ids=PLANTED)
def test_finds_what_is_planted(kernel, expected):
    # parts of wider memory, whose neighbours belong to nobody
    x, y = torch.randn(2, 16)[:, :7].unbind()
    assert found(kernel, x, y) == expected


@pytest.mark.parametrize("wait", [False, True])
def test_a_program_sees_what_its_other_threads_stored_after_a_barrier(wait):
    expected = set() if wait else {("y", accesses.READ_TOO_EARLY)}
    assert found(_reads_its_own, torch.randn(7), torch.empty(7), WAIT=wait) == expected


def test_gaps_of_a_view_are_outside_of_it():
    """A store into the queries, of a kernel that was given the keys of one packed tensor."""
    packed = torch.zeros(6, 10)
    keys = Memory(packed[:, 4:8], "keys")
    places = packed.data_ptr() + 4 * torch.arange(60).numpy()
    inside = keys.holds(places, 4).reshape(6, 10)
    assert inside[:, 4:8].all() and inside.sum() == 24
    assert not keys.holds(places, 2).any(), "elements of another size"


def test_what_overlaps_is_one_piece():
    windows = Memory(torch.zeros(10).unfold(0, 4, 1), "windows")
    assert windows.holds(windows.first + 4 * torch.arange(-1, 11).numpy(), 4).tolist() == [False, *[True] * 10, False]
    nothing = Memory(torch.zeros(0, 4), "nothing")
    assert not nothing.holds(nothing.first + torch.arange(4).numpy(), 4).any()


@pytest.mark.parametrize(
    "operation",
    [pytest.param(o, id=name, marks=[] if name in SAMPLE else pytest.mark.full) for name, o in OPERATIONS.items()],
)
def test_kernels_are_free_of_races_and_stay_inside(operation):
    assert not command.problems(operation, next(iter(operation.checks.values())))


@pytest.mark.full
@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        pytest.param(o, shape, id=f"{o.name}: {name}")
        for o in OPERATIONS.values()
        for name, shape in list(o.checks.items())[1:]
    ],
)
def test_so_they_are_on_all_other_shapes(operation, shape):
    assert not command.problems(operation, shape, torch.bfloat16)


@pytest.mark.full
def test_what_is_known_would_be_found(monkeypatch):
    """Every entry is still needed; and so are the barriers between what programs share and read again."""
    known = set(command.KNOWN)
    monkeypatch.setattr(command, "KNOWN", {})
    operation = OPERATIONS["focused_linear_attention"]
    assert {tuple(f[:3]) for shape in operation.checks.values() for f in command.problems(operation, shape)} == known
    monkeypatch.setattr(_Watch, "barrier", lambda watch, function: function)
    early = [f for f in command.problems(operation, next(iter(operation.checks.values()))) if f.kind not in known]
    assert {(f.kernel, f.tensor) for f in early if f.kind == accesses.READ_TOO_EARLY} == {f[:2] for f in known}


def test_the_command_says_what_is_wrong(monkeypatch, capsys):
    assert command.main(["layer_norm", "--quick"]) == 0
    assert " clean " in capsys.readouterr().out
    finding = accesses.Finding("_kernel", "x", accesses.ATOMIC, 3)
    monkeypatch.setattr(command, "problems", lambda *arguments: [finding])
    assert command.main(["layer_norm", "--quick"]) == 1
    assert "1 problems" in (out := capsys.readouterr().out) and "    _kernel: atomic operation (x, 3 times)" in out
    with pytest.raises(SystemExit) as exit:
        command.main(["no_such_operation"])
    assert exit.value.code == 2
    assert "no operation is called no_such_operation; choose from agent_attention" in capsys.readouterr().err
