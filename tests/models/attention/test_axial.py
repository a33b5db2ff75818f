"""Axial attention: what a token sees, and how its axes are put together."""

import pytest
import torch
from torch import Tensor

from models.attention import Grid, Site
from models.attention.axial import AxialAttention
from models.attention.layouts.axial import axial
from models.attention.softmax import softmax_attention

MAP = Grid(5, 7)
SITE = Site(32, 4, MAP, 0, 0, 2, "hierarchical")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, MAP.tokens, 32)


@pytest.mark.parametrize("summed", [True, False])
def test_a_token_sees_its_cross_or_in_two_steps_the_map(summed: bool) -> None:
    x = torch.randn(1, MAP.tokens, 32, requires_grad=True)
    AxialAttention(SITE, summed=summed)(x, MAP).x.unflatten(1, MAP[:2])[0, 1, 2].sum().backward()
    seen = x.grad.abs().sum(-1).view(5, 7) > 0
    cross = torch.zeros(5, 7, dtype=torch.bool)
    cross[1], cross[:, 2] = True, True
    assert torch.equal(seen, cross if summed else torch.ones_like(cross))


def test_with_equal_weights_it_is_the_layout(x: Tensor) -> None:
    """The layout sums the heads of both axes before one projection; here each has its projection and bias."""
    mixer, layout = AxialAttention(SITE), softmax_attention(SITE, layout=axial, qkv_bias=False)
    for axis in (mixer.columns, mixer.rows):
        axis.load_state_dict(layout.state_dict())
    torch.testing.assert_close(mixer(x, MAP).x, layout(x, MAP).x + layout.proj.bias)


def test_a_turned_map_turns_the_axes(x: Tensor) -> None:
    mixer, turned = AxialAttention(SITE), AxialAttention(SITE)
    turned.columns.load_state_dict(mixer.rows.state_dict())
    turned.rows.load_state_dict(mixer.columns.state_dict())
    other = x.unflatten(1, MAP[:2]).transpose(1, 2).flatten(1, 2)
    expected = mixer(x, MAP).x.unflatten(1, MAP[:2]).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(turned(other, Grid(7, 5)).x, expected)
