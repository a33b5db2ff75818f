"""Class attention asks for one token alone, and passes the map on as the code of XCiT does."""

import pytest
import torch
from timm.models.cait import ClassAttn

from models.attention import Grid
from models.layers.class_attention import ClassAttention, ClassBlock, ClassToken

GRID = Grid(3, 4, prefix=1)


def tokens() -> torch.Tensor:
    return torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(1))


def test_equals_timms():
    theirs, ours = ClassAttn(24, num_heads=3, qkv_bias=True), ClassAttention(24, 3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
        for end in ("weight", "bias"):
            joined = torch.cat([getattr(getattr(theirs, name), end) for name in "qkv"])
            getattr(ours.qkv, end).copy_(joined)
            getattr(ours.proj, end).copy_(getattr(theirs.proj, end))
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_the_map_is_doubled(tokens_norm):
    """What the next block reads as keys: the map and its norm, normed or not, twice."""
    torch.manual_seed(0)
    block = ClassBlock(24, 3, layer_scale=0.5, tokens_norm=tokens_norm)
    x = tokens()
    on_map = x + 0.5 * block.norm1(x)
    on_map = 2 * (block.norm2(on_map) if tokens_norm else on_map)[:, 1:]
    torch.testing.assert_close(block(x, GRID)[0][:, 1:], on_map)


def test_a_token_stands_in_front():
    join, x = ClassToken(24), tokens()[:, 1:]
    joined, grid = join(x, Grid(3, 4))
    assert (
        grid == GRID and torch.equal(joined[:, 1:], x) and torch.equal(joined[:, :1], join.class_token.expand(2, 1, 24))
    )


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"ClassAttention: 24 channels are no whole heads, got num_heads=5; set model.n"
    ):
        ClassAttention(24, 5)
