"""Shortened maps of keys and values: by convolution, by pooling, on maps that do not divide."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Grid
from models.layers.reduction import PooledReduction, SpatialReduction


def tokens(grid: Grid) -> Tensor:
    return torch.randn(2, grid.tokens, 8, generator=torch.Generator().manual_seed(0))


def test_convolution_then_norm_over_squares_of_tokens() -> None:
    grid, module = Grid(4, 6), SpatialReduction(8, 2)
    got, kv_grid = module(tokens(grid), grid)
    squares = tokens(grid).view(2, 2, 2, 3, 2, 8).permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
    expected = F.layer_norm(F.linear(squares, module.conv.weight.flatten(1), module.conv.bias), (8,), eps=1e-5)
    assert kv_grid == Grid(2, 3)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("grid", "reduced"), [(Grid(5, 7), Grid(3, 4)), (Grid(1, 9), Grid(1, 5)), (Grid(2, 2), Grid(1, 1))]
)
def test_no_token_of_an_odd_map_is_dropped(grid: Grid, reduced: Grid) -> None:
    module, x = SpatialReduction(8, 2), tokens(grid).requires_grad_()
    got, kv_grid = module(x, grid)
    assert kv_grid == module.reduced(grid) == reduced and got.shape == (2, reduced.cells, 8)
    (got * torch.randn_like(got)).sum().backward()
    assert x.grad.abs().amax(-1).gt(0).all()


@pytest.mark.parametrize("grid", [Grid(14, 14), Grid(9, 16), Grid(4, 5)])
def test_pooling_gives_the_same_map_from_every_map(grid: Grid) -> None:
    module, x = PooledReduction(8), tokens(grid)
    got, kv_grid = module(x, grid)
    pooled = F.adaptive_avg_pool2d(x.mT.reshape(2, 8, *grid[:2]), 7).flatten(2).mT
    projected = F.linear(pooled, module.conv.weight.flatten(1), module.conv.bias)
    assert kv_grid == module.reduced(grid) == Grid(7, 7)
    torch.testing.assert_close(got, F.gelu(F.layer_norm(projected, (8,), eps=1e-5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (SpatialReduction, "SpatialReduction: ratio must be at least 1, got 0; 1 keeps every token"),
        (PooledReduction, "PooledReduction: size must be at least 1, got 0; the paper uses 7"),
    ],
)
def test_refuses_sizes_below_one(make: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(8, 0)
