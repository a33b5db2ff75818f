"""What is particular to neighbourhood attention."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.neighborhood_attention import neighborhood_attention, rule, triton, triton_backward
from kernels.neighborhood_attention.cases import OPERATION, inputs

definition = OPERATION.reference
TILED = {"batch": 1, "grid": (3, 24), "heads": 1, "kernel": (2, 3), "head_dim": 16}


def gradients(function, given: dict) -> list[Tensor]:
    leaves = [t for t in given.values() if isinstance(t, Tensor)]
    generator = torch.Generator().manual_seed(1)
    out = function(**given)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=generator).to(out))]


def double(given: dict) -> dict:
    return {name: t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for name, t in given.items()}


def assert_equals_definition(given: dict) -> None:
    for found, wanted in zip(
        gradients(neighborhood_attention, given), gradients(definition, double(given)), strict=True
    ):
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("kernel", range(1, 8))
def test_tiles_know_who_sees_them(kernel: int) -> None:
    for n in range(kernel, 20):
        for stride in range(1, kernel + 1):
            keys = rule.keys_along(n, kernel, stride, 1)
            assert [rule.first_key(p, n, kernel, stride) for p in range(n)] == keys[:, 0].tolist()
            for key in range(n):
                seen_by = (keys == key).any(1).nonzero().flatten().tolist()
                assert rule.first_query(key, kernel, stride) == seen_by[0]
                assert rule.last_query(key, n, kernel, stride) == seen_by[-1]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_kernel_as_large_as_the_map_is_dense_attention(backend: str) -> None:
    kw = inputs("cpu", torch.float32, batch=2, grid=(5, 4), heads=2, kernel=(5, 4), head_dim=16)
    q, k, v = kw["qkv_BNC"].unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    cell = torch.cartesian_prod(torch.arange(5), torch.arange(4))
    away = cell - cell[:, None] + torch.tensor([4, 3])
    for bias in (kw["rpb"], None):
        added = None if bias is None else bias[:, away[..., 0], away[..., 1]]
        wanted = F.scaled_dot_product_attention(q, k, v, added, scale=0.3).transpose(1, 2).flatten(2)
        found = neighborhood_attention(**{**kw, "rpb": bias}, scale=0.3, backend=backend)
        torch.testing.assert_close(found, wanted)


def test_windows_are_window_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    kw = inputs(
        "cpu", torch.float32, batch=1, grid=(6, 8), heads=1, kernel=(3, 4), stride=(3, 4), head_dim=16, rpb=False
    )
    wanted = neighborhood_attention(**{**kw, "rpb": torch.zeros(1, 5, 7)})
    monkeypatch.setattr("kernels.neighborhood_attention.attend", None)
    torch.testing.assert_close(neighborhood_attention(**kw), wanted)


def test_a_bias_that_is_not_trained_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = triton_backward.launch
    monkeypatch.setattr(
        triton_backward, "launch", lambda kernel, *a, **k: launched.append(kernel.__name__) or launch(kernel, *a, **k)
    )
    kw = inputs("cpu", torch.float32, **TILED)
    passes = ["_backward_queries", "_backward_keys", "_backward_bias", "_sums_of_offsets"]
    for frozen, expected in (("rpb", passes[:2]), ("qkv_BNC", passes[:1] + passes[2:])):
        launched.clear()
        neighborhood_attention(**{**kw, frozen: kw[frozen].detach()}).sum().backward()
        assert launched == expected


@pytest.mark.parametrize("shape", [TILED, {**TILED, "grid": (5, 6), "dilation": (2, 1)}], ids=["tiles", "one"])
def test_a_program_takes_several_images(shape: dict, monkeypatch: pytest.MonkeyPatch, poisoned) -> None:
    """Sums over more images and classes than programs, the last program having less to do."""
    monkeypatch.setattr(triton_backward, "turns", lambda work, most: min(4, most))
    assert_equals_definition(inputs("cpu", torch.float32, **{**shape, "batch": 3}))


@pytest.mark.full
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
def test_any_head_width(head_dim: int, poisoned) -> None:
    for grid in ((4, 5), (4, 18)):
        assert_equals_definition(
            inputs("cpu", torch.float32, batch=1, grid=grid, heads=1, kernel=(3, 3), head_dim=head_dim)
        )


@pytest.mark.full
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [((1, 1), (1, 1), (4, 5)), ((11, 2), (1, 2), (1, 3)), ((12, 13), (12, 13), (1, 1)), ((2, 17), (2, 9), (3, 1))],
    ids=str,
)
def test_any_sides(kernel, stride, dilation, poisoned) -> None:
    given = {"kernel": kernel, "stride": stride, "dilation": dilation}
    assert_equals_definition(inputs("cpu", torch.float32, batch=1, grid=(13, 18), heads=1, head_dim=16, **given))


def test_tiles_are_the_papers() -> None:
    """A 7 × 7 kernel: tiles that divide the maps of a pyramid, and the steps through their keys."""
    sides = (7, 7), (1, 1)
    for side, dilation, tile, steps in ((56, 1, 8, 7), (28, 1, 7, 7), (14, 1, 7, 5), (7, 1, 7, 2), (56, 8, 7, 2)):
        tiles = triton.tiles_of((side, side), *sides, (dilation, dilation))
        assert tiles.tile == (tile, tile) and tiles.key_steps == steps
        assert tiles.whole == (side // dilation == 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (4, 4, 1)}, r"neighborhood_attention: a neighbourhood has no prefix tokens, got 1; pass the tokens"),
        ({"grid": (4, 5)}, r"qkv must be \(B, 4\*5, 3C\), got \(1, 16, 48\); pass the grid of this map"),
        ({"num_heads": 5}, r"qkv must be 3 x heads x head width wide, got 48 for 5 heads; project to 3C"),
        ({"kernel": (0, 2)}, r"kernel must be two numbers of at least 1, got \(0, 2\); give one for each axis"),
        ({"dilation": (1,)}, r"dilation must be two numbers of at least 1, got \(1,\); give one for each axis"),
        ({"stride": (3, 1)}, r"stride must be at most the kernel \(2, 2\), got \(3, 1\); with the same it is windows"),
        (
            {"dilation": (1, 3)},
            r"the map must hold kernel x dilation tokens along each axis, got \(4, 4\) for \(2, 2\) x \(1, 3\)",
        ),
        ({"rpb": torch.zeros(1, 3, 4)}, r"rpb must be \(1, 3, 3\) and floating, got \(1, 3, 4\) float32; give one"),
        (
            {"qkv_BNC": torch.zeros(1, 16, 3 * 130)},
            r"the kernels take at most 128 channels per head, got 130; use more",
        ),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    kw = {"qkv_BNC": torch.zeros(1, 16, 48), "grid": (4, 4), "num_heads": 1, "kernel": (2, 2)}
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**{**kw, **change})
