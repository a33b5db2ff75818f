"""Heads of several kinds before one projection: they are what each kind gives alone; windows of their own sizes."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models.attention import Grid, Refused, Site
from models.attention.axial import AxialAttention
from models.attention.cores.efficient import efficient_attention
from models.attention.explain import explained
from models.attention.heads_apart import HeadsApart
from models.attention.multi_window import multi_window_attention, windows_of_heads
from models.attention.softmax import softmax_attention

MAP = Grid(6, 8)
SITE = Site(32, 4, MAP, 0, 0, 2, "hierarchical")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, MAP.tokens, 32)


def test_heads_of_one_kind_are_that_kind(x: Tensor) -> None:
    """By the same weights: names and shapes are those of softmax attention."""
    apart, whole = HeadsApart(SITE, [(softmax_attention, 1), (softmax_attention, 3)]), softmax_attention(SITE)
    apart.load_state_dict(whole.state_dict())
    gates = torch.rand(2, MAP.tokens, 4)
    torch.testing.assert_close(apart(x, MAP, gates).x, whole(x, MAP, gates).x)
    torch.testing.assert_close(apart.queries(x), whole.queries(x))


def test_every_kind_computes_its_heads(x: Tensor) -> None:
    kinds = [partial(softmax_attention, window=3), efficient_attention]
    apart, gates = HeadsApart(SITE, list(zip(kinds, (1, 3), strict=True))), torch.zeros(2, MAP.tokens, 4)
    for kind, heads in zip(kinds, (slice(0, 1), slice(1, 4)), strict=True):
        alone = kind(SITE)
        alone.load_state_dict(apart.state_dict())
        gates.zero_()[..., heads] = 1
        torch.testing.assert_close(apart(x, MAP, gates).x, alone(x, MAP, gates).x)


def test_a_copy_has_a_projection_of_its_own(x: Tensor) -> None:
    """As the average of weights has: nothing in it points to the original."""
    apart = HeadsApart(SITE, [(softmax_attention, 2), (efficient_attention, 2)])
    before, other = apart(x, MAP).x, copy.deepcopy(apart)
    nn.init.zeros_(apart.qkv.weight)
    torch.testing.assert_close(other(x, MAP).x, before)


def test_the_matrix_of_each_kind_is_explained(x: Tensor) -> None:
    """One of all heads on the map: windows of one kind are put back on it."""
    apart = HeadsApart(SITE, [(partial(softmax_attention, window=(3, 4)), 1), (efficient_attention, 3)])
    expected = apart(x, MAP).x
    with explained(nn.ModuleDict({"attn": apart})) as matrices:
        torch.testing.assert_close(apart(x, MAP).x, expected)
    (matrix,) = matrices["attn"]
    windows, whole = (part.attention_matrix(x, MAP) for part in apart.parts)
    assert [tuple(each.shape) for each in (windows, whole, matrix)] == [(8, 1, 12, 12), (2, 3, 48, 48), (2, 4, 48, 48)]
    torch.testing.assert_close(matrix[:, 1:], whole)
    first = matrix[:, :1].unflatten(-1, MAP[:2]).unflatten(2, MAP[:2])[:, :, :3, :4, :3, :4].flatten(4).flatten(2, 3)
    torch.testing.assert_close(first, windows.unflatten(0, (2, 4))[:, 0])
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 4, 48))


def test_a_head_sees_its_window() -> None:
    """Windows of 2, 3 and the map: the gradient of one output token by each head alone."""
    torch.manual_seed(0)
    mixer = multi_window_attention(SITE._replace(num_heads=4), windows=[2, 3, 3, 0])
    assert mixer.heads == [1, 2, 1]
    for head, seen in enumerate((4, 9, 9, 48)):
        x, gates = torch.randn(1, 48, 32, requires_grad=True), torch.zeros(1, 48, 4)
        gates[..., head] = 1
        mixer(x, MAP, gates).x[0, 0].sum().backward()
        assert int((x.grad.abs().sum(-1) > 0).sum()) == seen


def test_without_windows_it_is_softmax_attention(x: Tensor) -> None:
    mixer, whole = multi_window_attention(SITE, windows=[0]), softmax_attention(SITE)
    whole.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x, MAP).x, whole(x, MAP).x)
    assert mixer.accepts.prefix == "attended" and multi_window_attention(SITE).accepts.prefix == "refused"


def test_windows_are_spread_over_the_heads() -> None:
    def spread(windows: list, heads: int, block: int = 0) -> list[int]:
        return windows_of_heads(windows, SITE._replace(num_heads=heads, block=block))

    assert spread([2, 4, 7, 0], 4) == [2, 4, 7, 0]
    assert spread([2, 4, 7, 0], 8) == [2, 2, 4, 4, 7, 7, 0, 0]
    assert spread([2, 4, 7, 0], 2) == [4, 0]
    assert [spread([[2, 4], [8, 0]], 2, block) for block in (0, 1, 2)] == [[2, 4], [8, 0], [2, 4]]


def test_wrong_parts_are_refused() -> None:
    with pytest.raises(Refused, match=r"\[1, 2\] heads of several kinds are not the 4 heads; change model.num_heads"):
        HeadsApart(SITE, [(softmax_attention, 1), (softmax_attention, 2)])
    with pytest.raises(Refused, match=r"heads of AxialAttention cannot be taken apart, since"):
        HeadsApart(SITE, [(softmax_attention, 2), (AxialAttention, 2)])
    for wrong in (7, "7", [], [2, -1], [2, True], [[2], 0]):
        with pytest.raises(ValueError, match=r"multi_window: windows must be .*, got .*; give sides in tokens"):
            multi_window_attention(SITE, windows=wrong)
