"""Bi-level routing attention: what its regions, routes and options promise."""

import hydra
import pytest
import torch
from torch import Tensor, nn

from kernels.heads import merge_heads, split_heads
from kernels.routed_attention import _mostly_open, gathered
from kernels.routed_attention import definition as routed_regions
from models.attention import Accepts, Grid, Refused, Site, check
from models.attention.biformer import BiLevelRoutingAttention, biformer_attention
from models.attention.lepe import ConvMixer, LePEAttention
from models.factory import instantiate
from models.layers.tokens import to_map, to_tokens

CONF = "../../../conf"


def site(height: int, width: int, dim: int = 32, heads: int = 2, prefix: int = 0) -> Site:
    return Site(dim, heads, Grid(height, width, prefix), 0, 0, 1, "hierarchical")


def tokens(place: Site, batch: int = 2) -> Tensor:
    return torch.randn(batch, place.grid.tokens, place.dim, generator=torch.Generator().manual_seed(0))


def softmax_with_lepe(module: BiLevelRoutingAttention, x: Tensor, grid: Grid) -> Tensor:
    """Attention over the whole map at the scale of BiFormer, plus LePE, written out."""
    heads, dim = module.num_heads, x.shape[-1]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in module.qkv(x).chunk(3, dim=-1))
    o = ((q @ k.mT) * dim**-0.5).softmax(-1) @ v
    v_map = to_map(v.transpose(1, 2).flatten(2), grid)
    return module.proj(o.transpose(1, 2).flatten(2) + to_tokens(module.lepe(v_map)))


@pytest.mark.parametrize("padding", ["input", "qkv"])
def test_routing_to_every_region_is_softmax_attention_plus_lepe(padding: str) -> None:
    place = site(6, 9)
    module, x = BiLevelRoutingAttention(place, num_regions=3, topk=9, padding=padding), tokens(place)
    torch.testing.assert_close(module(x, place.grid).x, softmax_with_lepe(module, x, place.grid))


@pytest.mark.parametrize(
    ("height", "width", "padding"), [(8, 12, "input"), (8, 12, "qkv"), (9, 14, "qkv"), (4, 4, "input")]
)
def test_the_matrix_is_what_the_forward_pass_applies(height: int, width: int, padding: str) -> None:
    place = site(height, width)
    module = BiLevelRoutingAttention(place, num_regions=4, topk=3, padding=padding, lepe_kernel=0)
    x = tokens(place)
    matrix = module.attention_matrix(x, place.grid)
    v = module.qkv(x)[..., 2 * place.dim :].unflatten(-1, (place.num_heads, -1)).transpose(1, 2)
    expected = module.proj((matrix @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, place.grid).x, expected)


def test_each_query_sees_the_keys_of_its_routes_and_no_others() -> None:
    place = site(6, 6)
    module, x = BiLevelRoutingAttention(place, num_regions=3, topk=2), tokens(place)
    seen = module.attention_matrix(x, place.grid)[:, 0] > 0
    routes = module.routes(x, place.grid)
    for query in (0, 13, 35):
        region = (query // 6 // 2) * 3 + query % 6 // 2
        keys = seen[0, query].nonzero().flatten()
        assert set(((keys // 6 // 2) * 3 + keys % 6 // 2).tolist()) == set(routes[0, region].tolist())
        assert len(keys) == 2 * 4


def test_routing_takes_no_gradient_and_unseen_regions_none_either() -> None:
    place = site(4, 4)
    module = BiLevelRoutingAttention(place, num_regions=2, topk=1, lepe_kernel=0)
    x = tokens(place, batch=1).requires_grad_()
    module(x, place.grid).x[0, 0].square().sum().backward()
    seen = module.attention_matrix(x, place.grid)[0, 0, 0] > 0
    seen[0] = True
    assert x.grad[0, ~seen].abs().max() == 0
    assert (x.grad[0, seen].abs().sum(-1) > 0).all()


def test_ties_go_to_the_lowest_regions() -> None:
    place = site(7, 7)
    module = BiLevelRoutingAttention(place, topk=5)
    routes = module.routes(torch.ones(1, 49, place.dim), place.grid)
    assert routes.tolist() == [[[0, 1, 2, 3, 4]] * 49]


def test_half_precision_does_not_change_the_routes() -> None:
    place = site(14, 14, dim=64)
    module, x = BiLevelRoutingAttention(place), tokens(site(14, 14, dim=64))
    with torch.autocast("cpu", torch.bfloat16):
        routes = module.routes(x, place.grid)
        half = module(x, place.grid).x
    assert torch.equal(routes, module.routes(x, place.grid))
    torch.testing.assert_close(half.float(), module(x, place.grid).x, rtol=0, atol=0.03)


@pytest.mark.parametrize("routing", ["hard", "soft_detached", "soft", "soft_learned"])
def test_every_parameter_is_trained_and_extreme_inputs_stay_finite(routing: str) -> None:
    place = site(8, 8)
    module = BiLevelRoutingAttention(place, topk=2, routing=routing)
    for scale in (1e4, 0.0, 1.0):
        module.zero_grad()
        module(tokens(place) * scale, place.grid).x.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_soft_routing_trains_the_router_and_hard_routing_does_not() -> None:
    place = site(8, 8)
    grads = {}
    for routing in ("soft", "soft_detached"):
        torch.manual_seed(0)
        module = BiLevelRoutingAttention(place, topk=2, routing=routing)
        module(tokens(place), place.grid).x.square().mean().backward()
        grads[routing] = module.qkv.weight.grad
    queries = slice(0, place.dim)
    assert (grads["soft"][queries] - grads["soft_detached"][queries]).norm() > 1e-3 * grads["soft"][queries].norm()


@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(5, 9), Grid(13, 18), Grid(1, 2), Grid(3, 1)])
@pytest.mark.parametrize("padding", ["input", "qkv"])
def test_any_map_at_run_time(grid: Grid, padding: str) -> None:
    module = BiLevelRoutingAttention(site(14, 14), padding=padding)
    x = tokens(site(*grid[:2]))
    assert module(x, grid).x.shape == x.shape
    regions = grid.cells if padding == "qkv" else 49  # cut to the map, or padded to the grid of regions
    assert module.routes(x, grid).shape[-1] == min(4, regions)


def test_regions_are_cut_to_the_side_of_the_map_that_a_model_is_built_for() -> None:
    place = site(4, 5)
    routes = BiLevelRoutingAttention(place).routes(tokens(place), place.grid)
    assert routes.shape == (2, 20, 4)


def test_padding_of_the_input_adds_regions_up_to_the_number() -> None:
    """The authors' NHWC code keeps 7×7 regions on a 9×9 map, the outer ones being padding alone; NCHW makes 9×9."""
    place = site(9, 9)
    counts = [
        BiLevelRoutingAttention(place, padding=padding).routes(tokens(place), place.grid).shape[1]
        for padding in ("input", "qkv")
    ]
    assert counts == [49, 81]


@pytest.mark.parametrize("kind", ["routed", "lepe"])
def test_gates_weight_the_heads(kind: str) -> None:
    place = site(8, 8)
    module = BiLevelRoutingAttention(place) if kind == "routed" else LePEAttention(place)
    x = tokens(place)
    ones = torch.ones(2, 64, 2)
    torch.testing.assert_close(module(x, place.grid, ones).x, module(x, place.grid).x)
    closed = ones.clone()
    closed[..., 1] = 0
    module(x, place.grid, closed).x.square().mean().backward()
    assert module.proj.weight.grad[:, :16].abs().max() > 0
    assert module.proj.weight.grad[:, 16:].abs().max() == 0


def test_gathering_selects_whole_regions_of_the_same_image() -> None:
    kv = torch.arange(2 * 3 * 2).view(6, 2, 1).float()
    routes = torch.tensor([[[2], [0], [1]], [[0], [0], [2]]])
    assert gathered(kv, routes, None).flatten().tolist() == [4, 5, 0, 1, 2, 3, 6, 7, 6, 7, 10, 11]
    halved = gathered(kv, routes, torch.full((2, 3, 1), 0.5))
    assert halved.flatten().tolist() == [2, 2.5, 0, 0.5, 1, 1.5, 3, 3.5, 3, 3.5, 5, 5.5]


def test_the_backward_pass_of_gathering_allocates_no_copy_per_region() -> None:
    """Largest tensor made in the backward pass: the gathered keys and values, not R times the map."""
    regions, keys, dim, topk = 49, 4, 8, 2
    kv = torch.randn(regions, keys, dim, requires_grad=True)
    picked = gathered(kv, torch.randint(regions, (1, regions, topk)), None)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Sizes():
        picked.sum().backward()
    assert 0 < largest <= regions * keys * dim * topk


@pytest.mark.parametrize("lepe_input", ["x", "v"])
def test_lepe_attention_takes_class_tokens_and_any_map(lepe_input: str) -> None:
    module = LePEAttention(site(7, 7, prefix=1), lepe_input=lepe_input, lepe_kernel=3)
    place = site(5, 9, prefix=1)
    x = tokens(place)
    with torch.no_grad():
        module.lepe.weight.zero_()
        module.lepe.bias.fill_(1.0)
        plain = module.proj(torch.zeros(1, 1, 32))
        shift = module.proj(torch.ones(1, 1, 32)) - plain
        with_lepe = module(x, place.grid).x
        module.lepe.bias.zero_()
        without = module(x, place.grid).x
    torch.testing.assert_close(with_lepe[:, :1], without[:, :1])
    torch.testing.assert_close(with_lepe[:, 1:], without[:, 1:] + shift)
    assert module.accepts == Accepts()


def test_the_configuration_serves_small_maps() -> None:
    with hydra.initialize(CONF, version_base=None):
        attention = instantiate(hydra.compose("attention/biformer").attention)
    for height, width, heads in ((4, 4, 2), (4, 4, 8), (56, 56, 2), (2, 2, 1)):
        place = site(height, width, heads=heads)
        module = attention(place)
        check(module, place)
        assert module(tokens(place, 1), place.grid).x.shape == (1, height * width, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "BiLevelRoutingAttention: topk must be a positive number or all, got 0; set attention.topk"),
        ({"topk": "most"}, "topk must be a positive number or all, got 'most'"),
        ({"num_regions": 0}, "num_regions must be a whole number of at least 1, got 0; set attention.num_regions"),
        ({"lepe_kernel": 4}, "lepe_kernel must be odd, got 4; give 3 or 5"),
        ({"padding": "none"}, "padding must be input or qkv, got 'none'; set attention.padding"),
        (
            {"routing": "softly"},
            "routing must be one of hard, soft_detached, soft, soft_learned, got 'softly'",
        ),
        ({"topk": True}, "topk must be a positive number or all, got True"),
    ],
)
def test_meaningless_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(site(8, 8), **options)


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        (
            site(1, 3),
            {},
            "topk=4 is more than the 1x3 regions of a 1x3 map; set attention.topk to at most 3, or to all",
        ),
        (site(8, 8), {"topk": 5, "num_regions": 2}, "topk=5 is more than the 2x2 regions of a 8x8 map"),
        (site(8, 8), {"qk_dim": 15}, "qk_dim=15 does not divide into 2 heads; set attention.qk_dim to a multiple of 2"),
        (site(8, 8, heads=3), {}, "32 channels do not divide into 3 heads"),
    ],
)
def test_sites_that_cannot_be_served(place: Site, options: dict, message: str) -> None:
    with pytest.raises(Refused, match=message):
        BiLevelRoutingAttention(place, **options)


def test_class_tokens_are_refused() -> None:
    place = site(8, 8, prefix=1)
    with pytest.raises(Refused, match=r"class token\(s\)"):
        check(BiLevelRoutingAttention(place), place)


def test_what_has_no_routes_or_matrix_says_so() -> None:
    place = site(8, 8)
    x = tokens(place)
    for options in ({"routing": "soft"}, {"kv_pool": nn.AdaptiveAvgPool2d(1)}):
        with pytest.raises(TypeError, match="no attention matrix with kv_pool or soft routing"):
            BiLevelRoutingAttention(place, **options).attention_matrix(x, place.grid)


def test_wrong_lepe_input() -> None:
    with pytest.raises(
        ValueError, match=r"LePEAttention: lepe_input must be x or v, got 'q'; set attention.lepe_input"
    ):
        LePEAttention(site(7, 7), lepe_input="q")
    with pytest.raises(ValueError, match="lepe_kernel must be odd, got 4; give 3 or 5, or 0 for none"):
        LePEAttention(site(7, 7), lepe_kernel=4)


def test_each_stage_has_its_attention() -> None:
    """The paper's 1, 4, 16 and all; a ViT, whose patches are those of the third stage, takes the third."""
    stages = [biformer_attention(site(14, 14)._replace(stage=stage, kind="hierarchical")) for stage in range(4)]
    assert [getattr(mixer, "topk", type(mixer).__name__) for mixer in stages] == [1, 4, 16, "LePEAttention"]
    assert biformer_attention(site(14, 14)._replace(kind="vit")).topk == 16
    assert biformer_attention(site(14, 14), topk=3).topk == 3
    assert type(biformer_attention(site(14, 14), topk=0)) is ConvMixer
    with pytest.raises(
        Refused, match=r"topk=\[1, 4\] has no entry for stage 2; set attention.topk to one value, or one"
    ):
        biformer_attention(site(14, 14)._replace(stage=2, kind="hierarchical"), topk=[1, 4])


def test_dense_attention_without_lepe_is_softmax_attention() -> None:
    place = site(5, 6)
    module, x = biformer_attention(place, topk="all", lepe_kernel=0), tokens(place)
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in module.qkv(x).chunk(3, dim=-1))
    o = (q @ k.mT / 4).softmax(-1) @ v  # 32 channels, 2 heads
    torch.testing.assert_close(module(x, place.grid).x, module.proj(o.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("regions", "topk", "cells", "keys"), [(9, 9, 4, 4), (9, 9, 40, 10), (8, 2, 4, 1), (8, 3, 1, 1)]
)
def test_masked_pairs_are_those_of_gathered_regions(regions, topk, cells, keys):
    """Where most regions are open, what is computed without copies of keys equals what the routes say."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2 * regions, n, 12) for n in (cells, keys, keys))
    q, k, v = (torch.randn(shape, generator=generator).double().requires_grad_() for shape in shapes)
    routes = torch.rand(2, regions, regions, generator=generator).argsort(-1)[..., :topk]
    assert _mostly_open(routes, q)
    found = routed_regions(q, k, v, routes, 3, scale=0.3)
    heads = (split_heads(t, 1, 3)[0] for t in (q, gathered(k, routes), gathered(v, routes)))
    wanted = merge_heads(torch.nn.functional.scaled_dot_product_attention(*heads, scale=0.3))
    assert torch.allclose(found, wanted, atol=1e-12)
    direction = torch.randn(found.shape, generator=generator).double()
    gradients = (torch.autograd.grad(o, (q, k, v), direction) for o in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_few_routes_are_gathered():
    """And all where nothing is computed but counted: a model's multiply-adds are those of its routes."""
    few, third = (torch.zeros(1, 49, topk, dtype=torch.long) for topk in (4, 16))
    assert not _mostly_open(few, torch.empty(49, 16, 8)) and not _mostly_open(third, torch.empty(49, 64, 8))
    assert _mostly_open(third, torch.empty(49, 4, 8)) and not _mostly_open(third, torch.empty(49, 4, 8, device="meta"))
