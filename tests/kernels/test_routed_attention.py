"""What holds for routing and routed attention alone; their parity with the definitions is in test_operations."""

import pytest
import torch
import torch.nn.functional as F

from kernels.operation import in_pytorch
from kernels.routed_attention import region_means, routed_attention, select_regions
from kernels.routed_attention.cases import inputs as random_inputs

reference = in_pytorch(routed_attention)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gradients(function, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the gradient of qkv of a fixed random combination of it."""
    out = function(**inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out.detach(), torch.autograd.grad(out, inputs["qkv_BNC"], direction)[0]


def shaped(**shape) -> dict:
    shape = {"batch": 1, "grid": (8, 8), "dim": 32, "heads": 1, "region": (4, 4), "topk": 2} | shape
    return random_inputs(DEVICE, torch.float32, **shape)


def same(inputs: dict, tolerance: float = 1e-5) -> None:
    wanted = inputs | {"qkv_BNC": inputs["qkv_BNC"].detach().double().requires_grad_()}
    for found, exact in zip(gradients(routed_attention, inputs), gradients(reference, wanted), strict=True):
        assert (found - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("head", [24, 128, *(pytest.param(n, marks=pytest.mark.full) for n in (16, 48, 64, 72, 96))])
@pytest.mark.parametrize("region", [(2, 2), (3, 6)], ids=["dense", "lists"])
def test_takes_any_head_width(head, region, poisoned):
    same(shaped(grid=(4, 6), dim=head, region=region, topk=1))


@pytest.mark.parametrize("grid", [(7, 9), (8, 8)], ids=["63 regions: bits", "64 regions: lists"])
def test_regions_of_one_cell_use_every_bit(grid, poisoned):
    inputs = shaped(grid=grid, dim=16, region=(1, 1), topk=1)
    inputs["routes_BRK"] = torch.arange(grid[0] * grid[1], device=DEVICE).flip(0).view(1, -1, 1)
    same(inputs)


@pytest.mark.parametrize("region", [(2, 4), (4, 4)], ids=["dense", "lists"])
def test_routing_to_all_regions_is_attention(region):
    rows, columns = 8 // region[0], 8 // region[1]
    inputs = shaped(heads=2, region=region, topk=rows * columns)
    q, k, v = inputs["qkv_BNC"].unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=32**-0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(routed_attention(**inputs), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("region", [(3, 3), (5, 4)], ids=["dense", "lists"])
def test_cells_outside_the_map_take_part_as_zeros(region):
    rows, columns = -(-7 // region[0]), -(-5 // region[1])
    inputs = shaped(grid=(7, 5), region=region, topk=rows * columns)
    q, k, v = inputs["qkv_BNC"].chunk(3, -1)
    k, v = (F.pad(t, (0, 0, 0, rows * columns * region[0] * region[1] - 35)) for t in (k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, scale=32**-0.5)
    torch.testing.assert_close(routed_attention(**inputs), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("region", [(2, 2), (4, 4)], ids=["dense", "lists"])
def test_a_region_that_all_are_routed_to_and_regions_that_none_is(region, poisoned):
    inputs = shaped(region=region, topk=1)
    inputs["routes_BRK"] = torch.full_like(inputs["routes_BRK"], 3)
    same(inputs)
    d_qkv = gradients(routed_attention, inputs)[1]
    assert not d_qkv[:, 0, 32:].any(), "no query attends to the first region"


@pytest.mark.parametrize("region", [(2, 2), (4, 4), (8, 8)], ids=["dense", "lists", "one region"])
def test_large_logits_of_either_sign_stay_finite(region, poisoned):
    """Weights of masked and of missing keys would overflow: 2^500 times zero is not a number."""
    inputs = shaped(grid=(8, 9), region=region, topk=1, dim=16)
    sign = torch.ones(48, device=DEVICE)
    sign[16:32] = -1
    inputs["qkv_BNC"] = (inputs["qkv_BNC"].detach().abs() * 12 * sign).requires_grad_()
    same(inputs, 1e-4)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_need_not_be_positive(scale, poisoned):
    same(shaped(region=(2, 2), topk=3) | {"scale": scale})


@pytest.mark.parametrize(
    ("grid", "region"),
    [((12, 12), (2, 2)), ((8, 10), (2, 2)), ((6, 7), (1, 1))],
    ids=["two parts", "a smaller last step", "as many regions as a step has cells"],
)
def test_small_regions_in_steps_of_half_precision(grid, region, poisoned):
    """Half precision takes other tiles than float32; 1% is four roundings of bfloat16."""
    inputs = shaped(grid=grid, region=region, topk=3, dim=16)
    inputs["qkv_BNC"] = inputs["qkv_BNC"].detach().bfloat16().requires_grad_()
    same(inputs, 0.01)


@pytest.mark.parametrize(
    ("grid", "region", "topk"),
    [((7, 9), (4, 4), 2), ((12, 8), (4, 4), 5), ((8, 8), (4, 8), 2)],
    ids=["padded", "a smaller last step", "32 cells"],
)
def test_regions_of_16_and_32_cells_as_batches(grid, region, topk, poisoned):
    """Only in half precision; 1% is four roundings of bfloat16."""
    inputs = shaped(grid=grid, region=region, topk=topk, dim=24)
    inputs["qkv_BNC"] = inputs["qkv_BNC"].detach().bfloat16().requires_grad_()
    same(inputs, 0.01)


def test_takes_other_integers_as_routes():
    inputs = shaped()
    wanted = routed_attention(**inputs)
    assert torch.equal(routed_attention(**{**inputs, "routes_BRK": inputs["routes_BRK"].int()}), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("grid", "region"), [((8, 8), (4, 4)), ((13, 7), (5, 4)), ((1, 1), (1, 1)), ((3, 2), (8, 8))])
def test_means_leave_out_what_is_outside_the_map(grid, region, dtype, poisoned):
    x = torch.randn(2, grid[0] * grid[1], 24, device=DEVICE).to(dtype).requires_grad_()
    found = region_means(x, grid, region)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, region_means(x, grid, region, backend="torch"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("regions", "topk"), [(1, 1), (9, 4), (18, 18), (70, 3)])
def test_selection_is_a_stable_descending_sort(regions, topk, poisoned):
    q, k = torch.randn(2, 1, regions, 40, device=DEVICE).unbind()
    found = select_regions(q, k, topk, 40**-0.5)
    assert torch.equal(found, select_regions(q, k, topk, 40**-0.5, backend="torch"))


def test_selection_gives_ties_to_the_lowest_index(poisoned):
    q = torch.ones(1, 20, 16, device=DEVICE)
    k = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0], device=DEVICE).repeat(4).view(1, 20, 1) * q
    assert select_regions(q, k, 20, 1.0)[0, 7].tolist() == [
        *(r for r in range(20) if r % 5 in (2, 4)),
        *(r for r in range(20) if r % 5 in (0, 1)),
        *(r for r in range(20) if r % 5 == 3),
    ]


def test_selection_gives_regions_that_exist_whatever_the_affinities(poisoned):
    k = torch.randn(1, 10, 16, device=DEVICE)
    k[0, 3], k[0, 5], k[0, 6] = float("nan"), float("-inf"), float("inf")
    found = select_regions(torch.ones_like(k), k, 10, 1.0)
    assert torch.equal(found.sort(-1).values, torch.arange(10, device=DEVICE).expand(1, 10, 10))
    assert torch.equal(found, select_regions(torch.ones_like(k), k, 10, 1.0, backend="torch"))


REFUSED = {
    "class tokens": ({"grid": (8, 8, 1)}, "class tokens belong to no region, got 1 of them; take them off first"),
    "grid": ({"grid": (8, 9)}, r"tokens must be \(B, 8\*9, channels\), got \(1, 64, 96\); pass the grid of this map"),
    "region": ({"region": (4, 0)}, r"grid and region must be positive, got \(8, 8\) and \(4, 0\); give the sides"),
    "heads": (
        {"num_heads": 3},
        "3 heads must divide queries and values of a projection .* got 32 and 32 channels; set",
    ),
    "qk_dim": (
        {"qk_dim": 48},
        "1 heads must divide queries and values .*, got 48 and 0 channels; set num_heads and qk",
    ),
    "routes": ({"region": (4, 2)}, r"routes must be \(1, 2\*4, K\), got \(1, 4, 2\); use select_regions"),
    "lepe_bias": ({"lepe_bias": torch.ones(32)}, "lepe_bias must come with lepe_weight, got no weight; give both, or"),
    "lepe_weight": ({"lepe_weight": torch.ones(32, 1, 2, 2)}, r"weight must be \(32, 1, k, k\) with odd k, got"),
    "wide lepe": (
        {"lepe_weight": torch.ones(32, 1, 9, 9)},
        "the kernels go up to 7x7 LePE weights, got 9; use backend",
    ),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_does_not_fit_together(changed, message):
    with pytest.raises(ValueError, match=message):
        routed_attention(**{**shaped(), **changed})


def test_refuses_routes_that_are_no_regions():
    inputs = shaped()
    routes = inputs["routes_BRK"]
    with pytest.raises(
        ValueError, match="routes must be at most 4 different integers per region, got 2 of float32; use"
    ):
        routed_attention(**{**inputs, "routes_BRK": routes.float()})
    with pytest.raises(ValueError, match="routes must be at most 4 different integers per region, got 6 of int64; use"):
        routed_attention(**{**inputs, "routes_BRK": routes.repeat(1, 1, 3)})


@pytest.mark.skipif(DEVICE == "cuda", reason="what is on a GPU is not looked at")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_refuses_a_region_that_is_listed_twice(backend):
    inputs = shaped(topk=3)
    inputs["routes_BRK"][0, 2] = torch.tensor([3, 0, 3])
    with pytest.raises(ValueError, match="routes must be different regions, got 3 twice for one region; use select"):
        routed_attention(**inputs, backend=backend)


def test_refuses_more_than_the_kernels_hold():
    wide = shaped(dim=144)
    with pytest.raises(ValueError, match="the kernels take at most 128 channels per head, got 144; use more heads"):
        routed_attention(**wide)
    many = torch.zeros(1, 65536, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="the kernels take at most 65535 regions, got 65536; use larger ones, or back"):
        routed_attention(torch.zeros(1, 65536, 3), many, (256, 256), (1, 1), 1)
    with pytest.raises(
        ValueError, match="select_regions: the kernel takes at most 1024 regions, got 1025; use backend"
    ):
        select_regions(torch.zeros(1, 1025, 2), torch.zeros(1, 1025, 2), 1, 1.0)


def test_routing_refuses_what_does_not_fit_together():
    q = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="select_regions: topk must be from 1 to the 4 regions, got 5; lower it"):
        select_regions(q, q, 5, 1.0)
    with pytest.raises(
        ValueError, match=r"select_regions: q and k must both be \(B, R, C\) on one device, got \(1, 4, 8\)"
    ):
        select_regions(q, q[:, :3], 1, 1.0)
    with pytest.raises(
        ValueError, match=r"region_means: tokens must be \(B, 2\*3, channels\), got \(1, 4, 8\); pass the"
    ):
        region_means(q, (2, 3), (1, 1))
    with pytest.raises(
        ValueError, match="region_means: backend must be auto, triton, torch, got cuda; choose one of them"
    ):
        region_means(q, (2, 2), (1, 1), backend="cuda")
