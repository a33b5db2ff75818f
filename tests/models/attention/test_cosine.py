"""Cosine attention: directions, the scale by the number of keys, and the continuous position bias."""

import math

import hydra
import pytest
import torch
from torch import Tensor

from models.attention import Grid, Refused, Site, check
from models.attention.cosine import ContinuousPositionBias, cosine_attention
from models.factory import instantiate

CONF = "../../../conf"


def site(height: int, width: int, prefix: int = 0, heads: int = 2) -> Site:
    return Site(32, heads, Grid(height, width, prefix), 0, 0, 1, "vit")


def tokens(place: Site, batch: int = 2) -> Tensor:
    return torch.randn(batch, place.grid.tokens, place.dim, generator=torch.Generator().manual_seed(0))


def heads_of(module, x: Tensor) -> list[Tensor]:
    return [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in module.qkv(x).chunk(3, dim=-1)]


def test_the_matrix_is_what_the_forward_pass_applies() -> None:
    place = site(5, 7)
    module, x = cosine_attention(place), tokens(place)
    v = heads_of(module, x)[2]
    matrix = module.attention_matrix(x, place.grid)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 35))
    torch.testing.assert_close(module(x, place.grid).x, module.proj((matrix @ v).transpose(1, 2).flatten(2)))


def test_only_the_direction_of_queries_and_keys_counts() -> None:
    place = site(4, 6)
    core = cosine_attention(place).core
    q, k, v = torch.randn(3, 2, 2, 24, 16)
    expected = core(q, k, v, place.grid, place.grid)
    torch.testing.assert_close(core(100 * q, 0.01 * k, v, place.grid, place.grid), expected)


def test_logits_are_the_equation() -> None:
    place = site(3, 5)
    module, x = cosine_attention(place), tokens(place)
    q, k, _ = heads_of(module, x)
    core = module.core
    unit_q, unit_k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    scale = math.log(15) / 0.24
    expected = ((unit_q + core.query_embedding) @ unit_k.mT * scale + core.bias(place.grid)).softmax(-1)
    torch.testing.assert_close(module.attention_matrix(x, place.grid), expected)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 7), (1, 5), (1, 1)])
def test_the_bias_depends_on_the_offset_alone(height: int, width: int) -> None:
    bias = ContinuousPositionBias(3, (4, 4), 16)
    values = bias(Grid(height, width))
    assert values.shape == (3, height * width, height * width)
    table = bias.cpb_fc2(bias.cpb_fc1(bias.coordinates((height, height), (width, width), torch.device("cpu"))).relu())
    for i in range(height * width):
        for j in range(height * width):
            dy, dx = i // width - j // width, i % width - j % width
            torch.testing.assert_close(values[:, i, j], table[dy + height - 1, dx + width - 1])


def test_an_offset_keeps_its_coordinate_on_a_larger_map() -> None:
    bias = ContinuousPositionBias(2, (7, 7), 16)
    small, large = (bias.coordinates((side, side), (side, side), torch.device("cpu")) for side in (7, 12))
    torch.testing.assert_close(large[5:-5, 5:-5], small)
    assert small.abs().max() == pytest.approx(math.log2(9) / 3)
    assert cosine_attention(site(7, 7)).core.bias.pretrain_size == (7, 7)
    assert cosine_attention(site(12, 12), pretrain_size=7).core.bias.pretrain_size == (7, 7)
    assert cosine_attention(site(12, 12), pretrain_size=(7, 9)).core.bias.pretrain_size == (7, 9)


def test_gates_weight_the_heads() -> None:
    place = site(4, 5)
    module, x = cosine_attention(place), tokens(place)
    ones = torch.ones(2, 20, 2)
    torch.testing.assert_close(module(x, place.grid, ones).x, module(x, place.grid).x)
    closed = ones.clone()
    closed[..., 1] = 0
    module(x, place.grid, closed).x.square().mean().backward()
    grad = module.proj.weight.grad
    assert grad[:, 16:].abs().max() == 0 < grad[:, :16].abs().max()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_gradients_are_finite_and_reach_every_parameter(scale: float) -> None:
    place = site(5, 6)
    module, x = cosine_attention(place), (tokens(place) * scale).requires_grad_()
    torch.nn.init.zeros_(module.qkv.bias)
    module(x, place.grid).x.sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert scale == 0 or parameter.grad.abs().max() > 0, name


def test_temperature_starts_as_in_the_paper() -> None:
    core = cosine_attention(site(4, 4)).core
    torch.testing.assert_close(torch.nn.functional.softplus(core.temperature), torch.full((2, 1, 1), 1 / 0.24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    place = site(6, 5)
    module, x = cosine_attention(place), tokens(place)
    expected = module(x, place.grid).x
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(module(x, place.grid).x.float(), expected, rtol=0, atol=0.05)
    assert module.to(dtype)(x.to(dtype), place.grid).x.dtype == dtype


def test_class_tokens_are_refused() -> None:
    place = site(4, 4, prefix=1)
    with pytest.raises(Refused, match=r"class token\(s\)"):
        check(cosine_attention(place), place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "cosine: hidden must be a whole number of at least 1, got 0; set attention.hidden"),
        (
            {"pretrain_size": 0},
            "cosine: pretrain_size must be a whole number of at least 1, or two, got 0; give",
        ),
        ({"pretrain_size": (7, 0)}, "cosine: pretrain_size must be a whole number of at least 1, or two"),
    ],
)
def test_meaningless_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_attention(site(4, 4), **options)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_configuration_serves_any_map(heads: int) -> None:
    with hydra.initialize(CONF, version_base=None):
        attention = instantiate(hydra.compose("attention/cosine").attention)
    module = attention(site(4, 4, heads=heads))
    for place in (site(4, 4), site(9, 3), site(1, 1)):
        assert module(tokens(place), place.grid).x.shape == (2, place.grid.cells, 32)
