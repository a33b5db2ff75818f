"""Kernelised attention with relative positions: the transform against the sum, and what its table and features do."""

import pytest
import torch
from torch import Tensor, nn

from conf.errors import UserError
from models import create_model
from models.attention import Grid, Refused, Site
from models.attention.cores.nprf import NPRFCore, nprf_attention, orthogonal

GRID = Grid(5, 7)
SITE = Site(32, 4, GRID, 0, 0, 1, "vit")
COUNTS = {"positive": 8, "more": 20, "signs": 0}


def made(features: str, size: tuple[int, int] = (5, 7), spread: float = 0.5) -> NPRFCore:
    core = NPRFCore(4, 8, size, COUNTS[features])
    nn.init.normal_(core.bias.table, std=spread)
    return core


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 4, tokens, 8, dtype=dtype) for _ in range(3))


@pytest.mark.parametrize("grid", [GRID, Grid(5, 7, 2), Grid(1, 9), Grid(8, 3), Grid(1, 1)], ids=str)
@pytest.mark.parametrize("features", COUNTS)
def test_the_transform_is_the_explicit_sum(features: str, grid: Grid) -> None:
    """On another map too, and beside class tokens, whose offsets have b = 0."""
    core, (q, k, v) = made(features), heads(grid.tokens)
    expected = torch.empty_like(v)
    b = core.bias.at(
        torch.cartesian_prod(torch.arange(1 - grid.height, grid.height), torch.arange(1 - grid.width, grid.width))
    )
    b = b.unflatten(1, (2 * grid.height - 1, 2 * grid.width - 1))
    phi_q, phi_k = core.featured(q), core.featured(k)
    for i in range(grid.tokens):
        factor = torch.ones(4, grid.tokens)
        for j in range(grid.tokens):
            if min(i, j) >= grid.prefix:
                (r, c), (y, x) = (divmod(at - grid.prefix, grid.width) for at in (i, j))
                factor[:, j] = b[:, r - y + grid.height - 1, c - x + grid.width - 1].exp()
        weights = (phi_q[:, :, i : i + 1] * phi_k).sum(-1) * factor
        expected[:, :, i] = (weights[..., None] * v).sum(2) / weights.sum(-1, keepdim=True)
    found = core(q, k, v, grid, grid)
    assert float(((found - expected).norm() / expected.norm()).detach()) < 1e-6
    torch.testing.assert_close(core.matrix(q, k, grid, grid) @ v, found, rtol=1e-4, atol=1e-5)


def test_in_float64_both_agree_far_beyond() -> None:
    core, (q, k, v) = made("positive").double(), heads(GRID.tokens, torch.float64)
    torch.testing.assert_close(core.matrix(q, k, GRID, GRID) @ v, core(q, k, v, GRID, GRID), rtol=0, atol=1e-12)


@pytest.mark.parametrize("features", COUNTS)
def test_without_a_bias_it_is_linear_attention(features: str) -> None:
    """As it starts."""
    core, (q, k, v) = NPRFCore(4, 8, (5, 7), COUNTS[features]), heads(GRID.tokens)
    phi_q, phi_k = core.featured(q), core.featured(k)
    plain = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(2, keepdim=True).mT)
    torch.testing.assert_close(core(q, k, v, GRID, GRID), plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_many_features_are_the_exponential_of_the_product() -> None:
    """Rows of the weights come near to softmax of the product of unit vectors."""
    q, k, _ = heads(GRID.tokens)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
    exact, errors = (unit[0] @ unit[1].mT).softmax(-1), []
    for count in (4, 64, 2048):
        found = NPRFCore(4, 8, (5, 7), count).matrix(q, k, GRID, GRID)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1


def test_random_directions_are_orthogonal() -> None:
    directions = orthogonal(12, 8)
    gram = directions[:8] @ directions[:8].T
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-4)
    assert float(orthogonal(4000, 8).square().mean()) == pytest.approx(1, abs=0.05)


def test_a_large_factor_of_one_offset_looks_there() -> None:
    """Every token sees the one to its right, however its features are."""
    core, (q, k, _) = made("positive", spread=0), heads(GRID.tokens)
    core.bias.table.data[:, 4, 6 + 1] = 12
    larger = core.matrix(q, k, GRID, GRID)
    core.bias.table.data += 200  # no exponential overflows
    torch.testing.assert_close(core.matrix(q, k, GRID, GRID), larger, rtol=1e-3, atol=1e-5)
    weights = core.matrix(q, k, GRID, GRID).unflatten(-1, (5, 7)).unflatten(2, (5, 7))
    for row, column in ((0, 0), (3, 5), (4, 2)):
        assert float(weights[:, :, row, column, row, column + 1].detach().min()) > 0.9


def test_lengths_of_queries_and_keys_do_not_matter() -> None:
    core, (q, k, v) = made("positive"), heads(GRID.tokens)
    torch.testing.assert_close(core(1e3 * q, 1e-3 * k, v, GRID, GRID), core(q, k, v, GRID, GRID))


def test_the_table_is_not_decayed_and_fits_another_size() -> None:
    settings = {"attention": "nprf", "depth": 1, "num_classes": 5}
    model = create_model("vit_32px", **settings)
    tables = {name for name, _ in model.named_parameters() if name.endswith("core.bias.table")}
    assert tables and tables <= model.no_weight_decay()
    weights = model.state_dict()
    assert model(torch.randn(2, 3, 48, 32)).isfinite().all() and any(key.endswith("core.directions") for key in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "relu"}, "nprf: features must be positive or signs, got 'relu'; set attention.features"),
        (
            {"num_features": 0},
            "nprf: num_features must be a whole number of at least 1, got 0; set attention.num_features",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nprf_attention(SITE, **options)


def test_a_number_of_features_that_are_given_is_refused() -> None:
    message = (
        "features=signs are two of each channel, which num_features cannot change; set attention.num_features=null"
    )
    with pytest.raises(Refused, match=message):
        nprf_attention(SITE, features="signs", num_features=4)
