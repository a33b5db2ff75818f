"""Relational heads: what they add to softmax attention, and what a relation is."""

import pytest
import torch
from torch import Tensor, nn

from models.attention import Grid, Refused, Site
from models.attention.relational import RelationalAttention
from models.attention.softmax import softmax_attention
from models.attention.symbols import SYMBOLS, PositionSymbols, RelativeSymbols

MAP = Grid(4, 6)
SITE = Site(32, 4, MAP, 0, 0, 2, "vit")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, MAP.tokens, 32)


def test_without_relations_and_symbols_ordinary_heads_are_left(x: Tensor) -> None:
    mixer, whole = RelationalAttention(SITE), softmax_attention(SITE, qkv_bias=False)
    for unused in (mixer.relational.wr, mixer.relational.symbols.table, whole.proj.bias):
        nn.init.zeros_(unused)
    rows = mixer.sensory.qkv.weight.unflatten(0, (3, 2, 8))
    with torch.no_grad():
        whole.qkv.weight.copy_(torch.cat([rows, torch.randn_like(rows)], dim=1).flatten(0, 2))
        whole.proj.weight.zero_()[:16, :16] = mixer.sensory.proj.weight
    torch.testing.assert_close(mixer(x, MAP).x, whole(x, MAP).x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_relations_equal_their_definition(symmetric: bool, x: Tensor) -> None:
    """Summed with every pair written out, as the paper has them."""
    heads = RelationalAttention(SITE, relations=4, symmetric=symmetric).relational
    weights = torch.rand(2, 2, 24, 24)
    q, k = (layer(x).unflatten(-1, (4, -1)) for layer in (heads.wq_rel, heads.wk_rel or heads.wq_rel))
    relations = torch.einsum("bire,bjre->brij", q, k) * 4**-0.5
    torch.testing.assert_close(
        heads._relations(weights, x), torch.einsum("bmij,brij->bmir", weights, relations), rtol=1e-4, atol=1e-5
    )
    assert torch.allclose(relations, relations.mT, atol=1e-6) == symmetric


def test_a_relative_symbol_is_of_the_offset_alone(x: Tensor) -> None:
    symbols = RelativeSymbols(SITE)
    offset = symbols.offset(MAP, x.device)
    assert offset.shape == (24, 24) and offset.unique().numel() == len(symbols.table) == 7 * 11
    assert offset[0, 7] == offset[1, 8] == offset[6, 13] != offset[7, 0]
    assert int(symbols.offset(Grid(9, 9), x.device).max()) == len(symbols.table) - 1
    file = RelativeSymbols(SITE._replace(grid=Grid(4, 4))).table.detach()
    assert symbols.resized("table", file).shape == symbols.table.shape


def test_a_symbol_of_a_position_says_where_a_token_is(x: Tensor) -> None:
    """Weights that look at one cell give its symbol, whatever the tokens are like; on another map it is between."""
    symbols, project = PositionSymbols(SITE), nn.Linear(32, 16)
    looking = torch.eye(24)[7].expand(2, 2, 24, 24)
    seen = symbols(looking, x, MAP, project)
    torch.testing.assert_close(seen[0, :, 3].flatten(), project(symbols.table[7]))
    assert symbols(torch.rand(2, 2, 70, 70), x, Grid(7, 10), project).shape == (2, 2, 70, 8)
    assert symbols.resized("table", torch.randn(16, 32)).shape == (24, 32)


@pytest.mark.parametrize("symbols", SYMBOLS)
def test_class_tokens_take_part(symbols: str) -> None:
    grid = Grid(4, 6, prefix=1)
    mixer, x = RelationalAttention(SITE._replace(grid=grid), symbols=symbols), torch.randn(2, 25, 32)
    mixer(x, grid).x.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.parameters())


def test_wrong_options_are_named() -> None:
    with pytest.raises(Refused, match=r"4 of 4 heads are relational, which leaves none .*; lower attention.relational"):
        RelationalAttention(SITE, relational_heads=4)
    with pytest.raises(Refused, match=r"16 channels of relational heads do not divide into relations=3; set attention"):
        RelationalAttention(SITE, relations=3)
    with pytest.raises(Refused, match=r"the weights of 24 x 24 pairs, more than max_tokens=20 allows; raise attention"):
        RelationalAttention(SITE, max_tokens=20)
