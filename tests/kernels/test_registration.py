"""Gradients of a part of the inputs, or through a part of the outputs: the same bits, with kernels left out."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import kernels
from kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATIONS = {o.name: o for module in kernels.OPERATIONS for o in kernels.operations_of(module)}
ACTIVATIONS = ("qkv_BNC", "x_BNC")
# operation, number of its check, what is trained, and kernels that are left out then; full: what takes long
FROZEN = {
    "routed, LePE": ("routed_attention", 0, "parameters", {"_differentiate", "_list_routes", "_gradients, input"}),
    "routed, qkv": ("routed_attention", 0, "activations", {"_gradients, input"}),
    "window, qkv": ("window_attention", "12x12, bias", "activations", {"_backward_bias"}),
    "aggregated, qkv": ("aggregated_attention", 0, "activations", {"_backward_pool", "_backward_bias"}),
    "aggregated, parameters": ("aggregated_attention", "one token", "parameters", {"_backward_keys"}),
    "window, bias": ("window_attention", "12x12, bias", "parameters", {"_backward_keys"}),
    "agent, qkv": ("agent_attention", 0, "activations", {"_gradients"}),
    "focused, qkv": ("focused_linear_attention", 0, "activations", {"_gradients, input"}),
    "inline, qkv": ("inline_attention", 0, "activations", {"_gradients"}),
    "norm, x": ("conv_norm", 0, "activations", {"_gradients, input"}),
    "norm, parameters": ("conv_norm", 0, "parameters", {"_gradients, input"}),
}
LONG = ("aggregated, qkv", "window, qkv", "window, bias", "inline, qkv")


@contextmanager
def launched() -> Iterator[list[str]]:
    """Names of the kernels that are interpreted inside; of one that may compute more, whether it does."""
    names, call = [], interpreter.GridExecutor.__call__

    def noted(executor, *arguments, **options):
        names.append(executor.fn.__name__ + ", input" * options.get("INPUT", False))
        return call(executor, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter.GridExecutor, "__call__", noted)
        yield names


def gradients(operation, inputs: dict, trained: list[str], outputs: list[int] | None = None) -> tuple[dict, set[str]]:
    """Of what is trained, through some of the outputs, and the kernels that the backward pass launched."""
    given = {
        name: t.detach().requires_grad_(name in trained) if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    found = operation.run(**given)
    found = [o for o in (found if isinstance(found, tuple) else (found,)) if isinstance(o, Tensor) and o.requires_grad]
    chosen = found if outputs is None else [found[i] for i in outputs]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).to(o) for o in found]
    directions = directions if outputs is None else [directions[i] for i in outputs]
    with launched() as names:
        got = torch.autograd.grad(chosen, [given[name] for name in trained], directions)
    return dict(zip(trained, got, strict=True)), set(names)


@pytest.mark.parametrize(
    ("name", "check", "kind", "left_out"),
    [pytest.param(*case, id=n, marks=[pytest.mark.full] if n in LONG else []) for n, case in FROZEN.items()],
)
def test_what_is_frozen_costs_nothing_and_changes_nothing(name, check, kind, left_out):
    operation = OPERATIONS[name]
    shape = operation.checks[check] if isinstance(check, str) else list(operation.checks.values())[check]
    inputs = operation.inputs(DEVICE, torch.float32, **shape)
    everything = [n for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad]
    wanted, all_kernels = gradients(operation, inputs, everything)
    trained = [n for n in everything if (n in ACTIVATIONS) == (kind == "activations")]
    found, kernels_left = gradients(operation, inputs, trained)
    assert trained and all(torch.equal(found[n], wanted[n]) for n in trained)
    if dispatch.INTERPRETED:
        assert left_out <= all_kernels and not left_out & kernels_left, (all_kernels, kernels_left)


@pytest.mark.parametrize("separate_from", [8, 512], ids=["two launches", "one launch"])
def test_gates_alone_need_no_gradient_of_keys(separate_from, monkeypatch, poisoned):
    """The first launch of two is enough; where there is one, it leaves out half of its work."""
    monkeypatch.setattr("kernels.moh_attention.triton.SEPARATE_FROM", separate_from)
    operation = OPERATIONS["moh_attention"]
    inputs = operation.inputs(DEVICE, torch.float32, **operation.checks["13 tokens, skipped"])
    wanted = gradients(operation, inputs, ["qkv_BNC", "gates_BNM"])[0]
    found, names = gradients(operation, inputs, ["gates_BNM"])
    assert torch.equal(found["gates_BNM"], wanted["gates_BNM"])
    assert names == {"_backward"} or not dispatch.INTERPRETED


@pytest.mark.parametrize("name", ["conv_norm", "route_heads"])
def test_an_output_that_is_not_used_has_no_gradient(name):
    """What comes through each output alone adds up to what comes through both, without zeros being written for one."""
    operation = OPERATIONS[name]
    inputs = operation.inputs(DEVICE, torch.float32, **next(iter(operation.checks.values())))
    everything = [n for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad]
    wanted, _ = gradients(operation, inputs, everything)
    parts = [gradients(operation, inputs, everything, outputs=[i])[0] for i in range(2)]
    for n in everything:
        torch.testing.assert_close(parts[0][n] + parts[1][n], wanted[n], rtol=1e-5, atol=1e-5)
