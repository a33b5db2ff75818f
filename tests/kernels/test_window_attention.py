"""What is particular to window attention."""

import pytest
import torch
from torch.nn import functional as F

from kernels.window_attention import triton, triton_backward, window_attention
from kernels.window_attention.cases import OPERATION, inputs

reference = OPERATION.reference

LARGE = {"batch": 1, "grid": (8, 8), "heads": 1, "window": (9, 8), "head_dim": 16, "padding": True, "bias": True}


def gradients(function, given: dict) -> list[torch.Tensor]:
    leaves = [t for t in given.values() if isinstance(t, torch.Tensor)]
    generator = torch.Generator().manual_seed(1)
    out = function(**given)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=generator).to(out))]


def double(given: dict) -> dict:
    return {
        name: t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for name, t in given.items()
    }


def assert_equals_reference(given: dict) -> None:
    for found, wanted in zip(gradients(window_attention, given), gradients(reference, double(given)), strict=True):
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("size", [(7, 7), (9, 8)], ids=str)
def test_one_window_is_dense_attention(size):
    kw = inputs("cpu", torch.float32, batch=2, grid=size, heads=2, window=size, head_dim=24)
    q, k, v = kw["qkv_BNC"].unflatten(2, (3, 2, 24)).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
    torch.testing.assert_close(window_attention(**kw, scale=0.3), wanted)
    torch.testing.assert_close(reference(**kw, scale=0.3), wanted)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("window", [(3, 4), (9, 8)], ids=str)
def test_padding_is_what_the_projection_makes_of_zeros(window, backend):
    """Windows of the zero-padded input, projected afterwards: as the models do it without this operation."""
    projection = torch.nn.Linear(32, 96)
    x = torch.randn(2, 10 * 9, 32)
    below, right = -10 % window[0], -9 % window[1]
    padded = F.pad(x.unflatten(1, (10, 9)), (0, 0, 0, right, 0, below))
    wanted = window_attention(projection(padded.flatten(1, 2)), padded.shape[1:3], 2, window, backend="torch")
    wanted = wanted.unflatten(1, padded.shape[1:3])[:, :10, :9].flatten(1, 2)
    found = window_attention(projection(x), (10, 9), 2, window, padding=projection.bias, backend=backend)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_shift_does_not_join_opposite_sides(backend):
    """Cells on one side of the map have no influence on cells on the other, however it is shifted."""
    qkv = torch.randn(1, 6 * 6, 48)
    before = window_attention(qkv, (6, 6), 1, (3, 3), shift=(1, 2), backend=backend)
    changed = qkv.unflatten(1, (6, 6)).clone()
    changed[:, 0] += 1
    changed[:, :, :2] += 1
    after = window_attention(changed.flatten(1, 2), (6, 6), 1, (3, 3), shift=(1, 2), backend=backend)
    same = (before == after).all(2).view(6, 6)
    assert same[1:, 2:].all() and not same[0].any() and not same[:, :2].any()


def test_a_program_takes_several_tiles(monkeypatch, poisoned):
    """Sums over more tiles than programs, the last program having less to do."""
    for module in (triton, triton_backward):
        monkeypatch.setattr(module, "turns", lambda work, most: min(3, most))
    for shape in ({"grid": (7, 6), "window": (2, 2), "batch": 7}, {"grid": (10, 9), "window": (9, 9), "batch": 2}):
        assert_equals_reference(
            inputs("cpu", torch.float32, heads=1, head_dim=16, padding=True, bias=True, shift=(1, 1), **shape)
        )


@pytest.mark.parametrize("head_dim", [72, 128, *(pytest.param(n, marks=pytest.mark.full) for n in (16, 48, 96))])
def test_any_head_width(head_dim, poisoned):
    for grid, window in (((3, 5), (2, 3)), ((9, 8), (9, 8))):
        assert_equals_reference(
            inputs("cpu", torch.float32, batch=1, grid=grid, heads=1, window=window, head_dim=head_dim, bias=True)
        )


@pytest.mark.parametrize("window", [(1, 7), (13, 1), (3, 3), (7, 9), (1, 100)], ids=str)
def test_any_window(window, poisoned):
    shift = (window[0] // 2, window[1] // 2)
    assert_equals_reference(
        inputs("cpu", torch.float32, batch=1, grid=(8, 10), heads=1, window=window, shift=shift, padding=True)
    )


def test_large_windows_are_operators_as_well():
    """The common tests see a small window only."""
    kw = inputs("cpu", torch.float32, **LARGE)
    qkv, padding, bias = (kw[name].detach() for name in ("qkv_BNC", "padding", "bias_MTT"))
    sizes = (8, 8, 1, 9, 8, 0, 0, 0.25)
    operators = torch.ops.vision_kernels
    out, lse = operators.window_attention_forward(qkv, padding, bias, *sizes)
    grad = torch.ones_like(out)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(operators.window_attention_forward.default, (qkv, padding, bias, *sizes), **checks)
    arguments = (grad, qkv, padding, bias, out, lse, *sizes, [True, True, True])
    torch.library.opcheck(operators.window_attention_backward.default, arguments, **checks)


def test_large_windows_are_the_same_every_time_and_compiled():
    kw = inputs("cpu", torch.float32, **LARGE)
    first = gradients(window_attention, kw)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for function in (window_attention, compiled):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(function, kw), strict=True))


def test_small_windows_keep_the_projection_alone():
    kw = inputs("cpu", torch.float32, batch=1, grid=(4, 4), heads=1, window=(2, 2), head_dim=16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        window_attention(**kw)
    assert [t.data_ptr() for t in saved] == [kw["qkv_BNC"].data_ptr()]


def test_padding_of_a_map_that_needs_none_has_no_part():
    kw = inputs("cpu", torch.float32, batch=1, grid=(4, 4), heads=1, window=(2, 2), head_dim=16, padding=True)
    for function in (window_attention, reference):
        (gradient,) = torch.autograd.grad(function(**kw).sum(), kw["padding"], allow_unused=True)
        assert gradient is None


@pytest.mark.parametrize("name", ["official", "pytorch"])
def test_baselines_compute_the_same(name):
    for shape in OPERATION.checks.values():
        kw = inputs("cpu", torch.float32, **shape)
        torch.testing.assert_close(OPERATION.baselines[name](**kw), reference(**kw), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (4, 4, 1)}, r"window_attention: windows take no prefix tokens, got 1; pass the tokens of the map"),
        ({"grid": (4, 5)}, r"qkv must be \(B, 4\*5, 3C\), got \(1, 16, 48\); pass the grid of this map"),
        ({"num_heads": 5}, r"qkv must be 3 x heads x head width wide, got 48 for 5 heads; project to 3C"),
        ({"num_heads": 0}, r"qkv must be 3 x heads x head width wide, got 48 for 0 heads"),
        ({"window": (0, 2)}, r"window must be \(height, width\) of at least 1, got \(0, 2\); give its sides in cells"),
        ({"shift": (2, 0)}, r"shift must be from 0 to below the window \(2, 2\), got \(2, 0\); half of it is usual"),
        ({"shift": (0, -1)}, r"shift must be from 0 to below the window \(2, 2\), got \(0, -1\)"),
        ({"padding": torch.zeros(16)}, r"padding must be \(48,\), got \(16,\); give the bias of the projection"),
        ({"bias_MTT": torch.zeros(1, 3, 4)}, r"bias must be \(1, 4, 4\), got \(1, 3, 4\); give one number per pair"),
        (
            {"qkv_BNC": torch.zeros(1, 16, 3 * 130)},
            r"the kernels take at most 128 channels per head, got 130; use more",
        ),
    ],
)
def test_refuses(change, message):
    kw = {"qkv_BNC": torch.zeros(1, 16, 48), "grid": (4, 4), "num_heads": 1, "window": (2, 2)}
    with pytest.raises(ValueError, match=message):
        window_attention(**{**kw, **change})
