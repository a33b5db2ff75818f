"""Attention on a quad-tree: what it sees of each node, where it is softmax attention, and what it costs."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import UserError
from models import create_model
from models.attention import Grid, Site
from models.attention.cores.hierarchical import HierarchicalCore, hierarchical_attention, of_ancestors, own_children
from models.attention.softmax import SoftmaxCore, softmax_attention

GRID = Grid(8, 8)
SITE = Site(32, 4, GRID, 0, 0, 1, "hierarchical")
MAPS = [GRID, Grid(7, 9), Grid(1, 13), Grid(20, 3), Grid(1, 1)]


def heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 4, tokens, 8, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("grid", MAPS, ids=str)
def test_a_leaf_of_the_whole_map_is_softmax_attention(grid: Grid) -> None:
    ours, theirs = hierarchical_attention(SITE, leaf=20), softmax_attention(SITE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, grid.tokens, 32)
    torch.testing.assert_close(ours(x, grid).x, theirs(x, grid).x)


@pytest.mark.parametrize("grid", MAPS, ids=str)
def test_what_is_computed_is_its_matrix(grid: Grid) -> None:
    core, (q, k, v) = HierarchicalCore((2, 2)), heads(grid.tokens)
    weights = core.matrix(q, k, grid, grid)
    torch.testing.assert_close(weights @ v, core(q, k, v, grid, grid))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, grid.tokens, dtype=torch.float64))
    assert float(weights.min()) > 0


@pytest.mark.parametrize("grid", MAPS, ids=str)
def test_equal_keys_have_equal_weights(grid: Grid) -> None:
    """On maps that make no whole tree too: nodes count by their tokens, and nothing is seen twice or beside the map."""
    core, (q, k, _) = HierarchicalCore((2, 3)), heads(grid.tokens)
    weights = core.matrix(q, k[:, :, :1].expand_as(k), grid, grid)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / grid.tokens))


def test_keys_that_are_equal_inside_nodes_give_softmax_attention() -> None:
    """Of four leaves with one key each."""
    q, k, v = heads(GRID.tokens)
    k = k[:, :, :4].unflatten(2, (2, 2)).repeat_interleave(4, 2).repeat_interleave(4, 3).flatten(2, 3)
    expected = SoftmaxCore(4, 8)(q, k, v, GRID, GRID)
    torch.testing.assert_close(HierarchicalCore((4, 4))(q, k, v, GRID, GRID), expected)


def test_a_node_elsewhere_is_seen_as_one() -> None:
    """A token in the corner of 8 × 8 with leaves of 2 × 2: exact tokens, then leaves beside it, then quarters."""
    q, k, _ = heads(GRID.tokens)
    row = HierarchicalCore((2, 2)).matrix(q, k, GRID, GRID)[0, 0, 0].unflatten(0, (8, 8))
    nodes = [row[:2, 2:4], row[2:4, :2], row[2:4, 2:4], row[:4, 4:], row[4:, :4], row[4:, 4:]]
    assert all(float(node.max() - node.min()) < 1e-12 for node in nodes)
    assert float(row[:2, :2].std()) > 1e-4 and len({round(float(node[0, 0]), 12) for node in nodes}) == 6
    q_D, k_HWD = q[0, 0, 0] / 8**0.5, k[0, 0].unflatten(0, (8, 8))
    quarter, first = q_D @ k_HWD[:4, 4:].mean((0, 1)), q_D @ k_HWD[0, 0]
    torch.testing.assert_close(row[0, 4] / row[0, 0], (quarter - first).exp())


@pytest.mark.parametrize("leaves", [(5, 6), (1, 9), (1, 1)], ids=str)
def test_every_token_is_in_one_node(leaves: tuple[int, int]) -> None:
    """Children of all ancestors, less those that hold the leaf, and the leaf itself are the whole map."""
    number = leaves[0] * leaves[1]
    held = of_ancestors(torch.eye(number).view(1, 1, *leaves, number))[0, 0]  # (R, K, tokens)
    own = own_children(*leaves, held.device)
    assert torch.equal(held.diagonal(dim1=0, dim2=2).T > 0, own)
    torch.testing.assert_close((held * ~own[..., None]).sum(1) + torch.eye(number), torch.ones(number, number))


def test_the_cost_is_that_of_a_leaf_and_the_levels() -> None:
    """N (b + 4 log_4(N / b)) pairs, counted."""
    for side, levels in ((8, 1), (16, 2), (32, 3)):
        q, k, v = heads(side**2)
        with FlopCounterMode(display=False) as counter:
            HierarchicalCore((4, 4))(q, k, v, Grid(side, side), Grid(side, side))
        pairs = side**2 * (16 + 4 * levels)
        assert counter.get_total_flops() == 2 * 4 * pairs * 2 * 2 * 8


def test_class_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"set model\.class_token=false"):
        create_model("vit_32px", attention="hierarchical", class_token=True, depth=1)


def test_a_leaf_of_no_tokens_is_refused() -> None:
    message = "hierarchical: leaf must be a whole number of at least 1, or two, got 0; set attention.leaf, e.g. 4"
    with pytest.raises(UserError, match=message):
        hierarchical_attention(SITE, leaf=0)
