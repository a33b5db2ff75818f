"""Combiner on the axes of a map: its weights of all tokens on all tokens, and what it is on one row or one column."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import UserError
from models import create_model
from models.attention import Grid, Site
from models.attention.cores.combiner import SUMMARIES, CombinerCore, combiner_attention
from models.attention.softmax import SoftmaxCore

GRID = Grid(4, 6)
SITE = Site(32, 4, GRID, 0, 0, 1, "hierarchical")
each = pytest.mark.parametrize("summaries", SUMMARIES)


def heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(2 * torch.randn(2, 4, tokens, 8, dtype=torch.float64) for _ in range(3))


@each
def test_it_is_one_softmax_over_the_row_and_the_summaries(summaries: str) -> None:
    """Token by token, as the equations say."""
    q, k, v = heads(GRID.tokens)
    found = CombinerCore(summaries)(q, k, v, GRID, GRID)
    q, k, v, found = (t.unflatten(2, (4, 6)) for t in (q / 8**0.5, k, v, found))
    for r, c in ((0, 0), (2, 5), (3, 1)):
        asking = q.mean(3) if summaries == "fixed" else q[:, :, :, c]  # (B, M, H, D)
        rho = (k @ asking[..., None])[..., 0].softmax(-1)  # (B, M, H, W)
        keys, values = ((rho[..., None] * t).sum(3) for t in (k, v))
        keys = k.mean(3) if summaries == "fixed" else keys
        keys, values = torch.cat([k[:, :, r], keys], dim=2), torch.cat([v[:, :, r], values], dim=2)
        weights = (keys @ q[:, :, r, c, :, None])[..., 0].softmax(-1)
        torch.testing.assert_close((weights[..., None] * values).sum(2), found[:, :, r, c])


@each
def test_every_token_has_a_weight_on_every_other_and_they_sum_to_one(summaries: str) -> None:
    q, k, v = heads(GRID.tokens)
    core = CombinerCore(summaries)
    weights = core.matrix(q, k, GRID, GRID)
    assert weights.shape == (2, 4, 24, 24) and float(weights.min()) > 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 24, dtype=torch.float64))
    torch.testing.assert_close(weights @ v, core(q, k, v, GRID, GRID))


def test_one_row_is_softmax_attention() -> None:
    """Its summary is what the row gives already."""
    grid = Grid(1, 10)
    q, k, v = heads(10)
    torch.testing.assert_close(CombinerCore()(q, k, v, grid, grid), SoftmaxCore(4, 8)(q, k, v, grid, grid))


@each
def test_one_column_is_softmax_attention_with_the_own_token_twice(summaries: str) -> None:
    grid = Grid(10, 1)
    q, k, _ = heads(10)
    twice = (q @ k.mT * 8**-0.5).exp() * (1 + torch.eye(10))
    torch.testing.assert_close(CombinerCore(summaries).matrix(q, k, grid, grid), twice / twice.sum(-1, keepdim=True))


def test_summaries_that_are_fixed_are_the_same_from_all_columns() -> None:
    """Weights on another row are in proportion from wherever they are given."""
    q, k, _ = heads(GRID.tokens)
    for summaries in SUMMARIES:
        weights = CombinerCore(summaries).matrix(q, k, GRID, GRID).unflatten(-1, (4, 6))[:, :, :6, 2]
        shares = weights / weights.sum(-1, keepdim=True)
        assert torch.allclose(shares, shares[:, :, :1]) == (summaries == "fixed")


def test_the_cost_is_that_of_the_sides() -> None:
    """Four times the tokens in a square of twice the side: eight times as much."""
    costs = []
    for side in (8, 16):
        q, k, v = heads(side**2)
        with FlopCounterMode(display=False) as counter:
            CombinerCore()(q, k, v, Grid(side, side), Grid(side, side))
        costs.append(counter.get_total_flops())
    assert costs[1] == 8 * costs[0]


def test_class_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"set model\.class_token=false"):
        create_model("vit_32px", attention="combiner_axial", class_token=True, depth=1)


def test_unknown_summaries_are_refused() -> None:
    message = "combiner_axial: summaries must be axial or fixed, got 'mean'; set attention.summaries"
    with pytest.raises(UserError, match=message):
        combiner_attention(SITE, summaries="mean")
