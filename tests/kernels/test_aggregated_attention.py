"""What is particular to aggregated attention."""

import math

import pytest
import torch
from torch import Tensor

from kernels.aggregated_attention import aggregated_attention, triton, triton_backward, triton_pool
from kernels.aggregated_attention.cases import OPERATION, inputs

reference = OPERATION.reference

SMALL = {"batch": 1, "grid": (3, 4), "pool": 2, "heads": 1, "head_dim": 8}


def gradients(function, given: dict) -> dict[str, Tensor]:
    leaves = {name: t for name, t in given.items() if isinstance(t, Tensor) and t.requires_grad}
    generator = torch.Generator().manual_seed(1)
    out = function(**given)
    direction = torch.randn(out.shape, generator=generator).to(out)
    found = torch.autograd.grad(out, list(leaves.values()), direction)
    return {"output": out.detach(), **dict(zip(leaves, found, strict=True))}


def double(given: dict) -> dict:
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in given.items()
    }


def assert_equals_reference(given: dict) -> None:
    found, wanted = gradients(aggregated_attention, given), gradients(reference, double(given))
    for name in wanted:
        assert (found[name].double() - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def token_by_token(
    qkv_BNC, kv_pool_BPC, scale_M, query_embedding_MD, local_bias_MT, pool_bias_MNP, tokens_MDT, token_bias_MT,
    grid, num_heads, window, gates_BNM,
) -> Tensor:  # fmt: skip
    """The definition for one image and one head, with a loop over tokens and their neighbours."""
    (q, k, v), (k_pool, v_pool) = qkv_BNC[0].chunk(3, -1), kv_pool_BPC[0].chunk(2, -1)
    q, k, k_pool = (t / t.norm(dim=-1, keepdim=True) for t in (q, k, k_pool))
    radius, out = window // 2, torch.empty_like(q)
    steps = [(y, x) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)]
    for n in range(len(q)):
        y, x = divmod(n, grid[1])
        there = {
            j: (y + dy) * grid[1] + x + dx
            for j, (dy, dx) in enumerate(steps)
            if 0 <= y + dy < grid[0] and 0 <= x + dx < grid[1]
        }
        scaled = (q[n] + query_embedding_MD[0]) * scale_M[0] * math.log(len(there) + len(k_pool))
        logits = [scaled @ k[i] + local_bias_MT[0, j] for j, i in there.items()]
        logits += [scaled @ k_pool[p] + pool_bias_MNP[0, n, p] for p in range(len(k_pool))]
        weights = torch.stack(logits).softmax(0)
        learned = q[n] @ tokens_MDT[0] + token_bias_MT[0]
        near = sum((weights[at] + learned[j]) * v[i] for at, (j, i) in enumerate(there.items()))
        out[n] = (near + weights[len(there) :] @ v_pool) * (1 if gates_BNM is None else gates_BNM[0, n, 0])
    return out[None]


@pytest.mark.parametrize("window", [1, 3, 5])
def test_reference_is_the_sum_over_neighbours_and_pooled_tokens(window):
    shape = {"batch": 1, "grid": (4, 5), "pool": 3, "heads": 1, "head_dim": 6, "window": window, "gates": window == 3}
    given = {
        name: t.detach() if isinstance(t, Tensor) else t
        for name, t in double(inputs("cpu", torch.float32, **shape)).items()
    }
    torch.testing.assert_close(reference(**given), token_by_token(**given))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_is_far_is_seen_through_the_pool_only(backend):
    """The last token of a row and the first of the next are next to each other in memory, and not in the map."""
    given = inputs("cpu", torch.float32, **{**SMALL, "grid": (3, 5)})
    before = aggregated_attention(**given, backend=backend)
    changed = given["qkv_BNC"].detach().clone()
    changed[:, 4] += 1
    after = aggregated_attention(**{**given, "qkv_BNC": changed}, backend=backend)
    different = (before != after).any(2).view(3, 5)
    assert different.nonzero().tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]


@pytest.mark.full
def test_sums_over_several_tiles_and_images(monkeypatch, poisoned):
    """A program of the passes over the pooled map takes several tiles, or images, and the last one has less to do."""
    monkeypatch.setattr(triton_pool, "turns", lambda work, most: min(2, most))
    assert_equals_reference(inputs("cpu", torch.float32, **{**SMALL, "batch": 3, "grid": (1, 33), "window": 1}))


def test_tokens_of_zeros_have_finite_gradients(poisoned):
    given = inputs("cpu", torch.float32, **SMALL)
    with torch.no_grad():
        given["qkv_BNC"][:, 5] = 0
        given["kv_pool_BPC"][:, 1] = 0
    assert_equals_reference(given)


def test_a_gate_of_zero_keeps_its_gradient(poisoned):
    given = inputs("cpu", torch.float32, **SMALL, gates=True)
    with torch.no_grad():
        given["gates_BNM"][:, 3:] = 0
    assert not aggregated_attention(**given)[:, 3:].any()
    assert_equals_reference(given)


def test_neighbours_are_not_copied_for_backward():
    """The authors' code keeps T copies of keys and values; the definition keeps less than three of both."""
    given = inputs("cpu", torch.float32, batch=1, grid=(32, 32), pool=1, heads=1, head_dim=64)
    saved = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = reference(**given)
    assert sum(saved.values()) < 6 * out.numel() * 4 + given["qkv_BNC"].numel() * 4


def test_the_kernels_keep_their_inputs_and_one_number_per_softmax():
    given = inputs("cpu", torch.float32, **SMALL)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        aggregated_attention(**given)
    known = {t.data_ptr() for t in given.values() if isinstance(t, Tensor)}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(1, 1, 12)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_decides_the_dtype(backend):
    given = inputs("cpu", torch.float32, **SMALL)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = aggregated_attention(**given, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(**given), rtol=0.05, atol=0.05)


def test_parameters_may_have_a_dtype_of_their_own():
    given = inputs("cpu", torch.float32, **SMALL)
    bias = given["pool_bias_MNP"].detach().to(torch.bfloat16).requires_grad_()
    found = gradients(aggregated_attention, {**given, "pool_bias_MNP": bias})
    wanted = gradients(reference, {**given, "pool_bias_MNP": bias.detach().float().requires_grad_()})
    assert found["pool_bias_MNP"].dtype == torch.bfloat16
    torch.testing.assert_close(found["output"], wanted["output"])
    torch.testing.assert_close(found["pool_bias_MNP"].float(), wanted["pool_bias_MNP"], rtol=0.01, atol=1e-4)


def test_a_block_covers_the_map_with_the_fewest():
    assert triton.shape_of_block((56, 56), 4) == (2, 2)
    assert triton.shape_of_block((28, 28), 4) in ((4, 1), (1, 4))
    assert triton.shape_of_block((5, 5), 1) == (1, 1)


@pytest.mark.parametrize(
    ("patches", "shape"),
    [
        pytest.param(4, {"grid": (6, 9), "pool": 3, "head_dim": 12}, id="four patches, which the map cuts"),
        pytest.param(2, {"grid": (3, 9), "pool": 35, "head_dim": 36}, id="two patches"),
        pytest.param(1, {"grid": (5, 6), "pool": 2, "head_dim": 8, "window": 7}, id="7x7 window"),
        pytest.param(1, {"grid": (3, 5), "pool": 2, "head_dim": 72}, id="one patch"),
    ],
)
def test_patches_and_their_halos_give_every_window(patches, shape, monkeypatch, poisoned):
    """As many at once as of 16-bit numbers, though these are exact."""
    usual = triton.constants_of

    def constants_of(activations, heads, grid, *others):
        return usual(activations, heads, grid, *others) | dict(
            zip(("GY", "GX"), triton.shape_of_block(grid, patches), strict=True)
        )

    for module in (triton, triton_backward):
        monkeypatch.setattr(module, "constants_of", constants_of)
    assert_equals_reference(inputs("cpu", torch.float32, **{**SMALL, **shape}))


def test_rows_at_odd_places_are_read(poisoned):
    """16 bytes at once only where every row begins at a multiple of them."""
    given = inputs("cpu", torch.float32, **SMALL)
    for name, extra in (("qkv_BNC", 1), ("kv_pool_BPC", 2)):
        wide = torch.randn(*given[name].shape[:2], given[name].shape[2] + extra)
        given[name] = wide[..., extra:].detach().requires_grad_()
    strides = triton.constants_of((given["qkv_BNC"], given["kv_pool_BPC"]), 1, (3, 4), 3, False)
    assert strides["ALIGN"] == 1
    assert_equals_reference(given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_and_tiny_keys_stay_finite_in_half_precision(dtype, poisoned):
    """Norms are factors of products in float32, and directions are what a 16-bit product takes."""
    given = inputs("cpu", dtype, **SMALL)
    with torch.no_grad():
        given["qkv_BNC"][:, 1] *= 1e3
        given["qkv_BNC"][:, 2] *= 1e-3
        given["qkv_BNC"][:, 3] = 0
        given["kv_pool_BPC"][:, 1] *= 1e-3
    found, wanted = gradients(aggregated_attention, given), gradients(reference, double(given))
    eager = gradients(reference, given)
    for name in wanted:
        error, allowed = ((t[name].double() - wanted[name]).norm() / wanted[name].norm() for t in (found, eager))
        assert error <= max(2 * allowed, torch.finfo(dtype).eps), name


@pytest.mark.parametrize("name", ["official", "pytorch"])
def test_baselines_compute_the_same(name):
    for shape in OPERATION.checks.values():
        given = inputs("cpu", torch.float32, **shape)
        torch.testing.assert_close(OPERATION.baselines[name](**given), reference(**given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": (3, 4, 1)},
            r"aggregated_attention: a neighbourhood has no prefix tokens, got 1; pass the tokens of the map alone",
        ),
        ({"grid": (3, 5)}, r"qkv must be \(B, 3\*5, 3C\), got \(1, 12, 24\); pass the grid of this map"),
        ({"num_heads": 5}, r"qkv must be 3 x heads x head width wide, got 24 for 5 heads; project to 3C"),
        (
            {"kv_pool_BPC": torch.zeros(1, 2, 24)},
            r"kv_pool must be \(1, P, 16\) with P >= 1, got \(1, 2, 24\); project the pooled map to keys and values",
        ),
        ({"kv_pool_BPC": torch.zeros(1, 0, 16)}, r"kv_pool must be \(1, P, 16\) with P >= 1, got \(1, 0, 16\)"),
        ({"window": 2}, r"window must be odd, got 2; a neighbourhood has its token in the middle"),
        (
            {"local_bias_MT": torch.zeros(1, 25)},
            r"local_bias must be \(1, 9\) and floating, got \(1, 25\) float32; see the shapes of the function",
        ),
        (
            {"gates_BNM": torch.ones(1, 12, 1, dtype=torch.bool)},
            r"gates must be \(1, 12, 1\) and floating, got \(1, 12, 1\) bool; see the shapes of the function",
        ),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        aggregated_attention(**{**inputs("cpu", torch.float32, **SMALL), **change})


def test_refuses_wide_heads():
    given = inputs("cpu", torch.float32, **{**SMALL, "head_dim": 130})
    with pytest.raises(ValueError, match=r"the kernels take at most 128 channels per head, got 130; use more heads"):
        aggregated_attention(**given)
