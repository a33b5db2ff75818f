"""Softmax attention against PyTorch's own, and its windows against the mask they stand for."""

import pytest
import torch
from torch import nn

from models.attention import Grid, Refused, Site
from models.attention.dual import dual_attention
from models.attention.softmax import softmax_attention

MAP = Grid(6, 8)


def site(grid=MAP, block=0, dim=16, heads=2):
    return Site(dim=dim, num_heads=heads, grid=grid, stage=0, block=block, depth=2, kind="vit")


def test_equals_multihead_attention_of_pytorch():
    ours = softmax_attention(site())
    theirs = nn.MultiheadAttention(16, 2, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(
        {
            "qkv.weight": theirs.in_proj_weight,
            "qkv.bias": theirs.in_proj_bias,
            "proj.weight": theirs.out_proj.weight,
            "proj.bias": theirs.out_proj.bias,
        }
    )
    x = torch.randn(3, 48, 16)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(ours(x, MAP).x, expected)
    torch.testing.assert_close(ours.attention_matrix(x, MAP), weights)


@pytest.mark.parametrize("block", [0, 1], ids=["plain", "shifted"])
def test_tokens_see_their_window_only(block):
    """The gradient of one output token reaches exactly the tokens of its window; shifted windows do not wrap."""
    mixer = softmax_attention(site(block=block), window=4, shift=True, relative_position_bias=True)
    x = torch.randn(1, 48, 16, requires_grad=True)
    mixer(x, MAP).x[0, 0].sum().backward()
    seen = x.grad.abs().sum(-1).view(6, 8) > 0
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[: 2 if block else 4, : 2 if block else 4] = True
    assert torch.equal(seen, expected)


def test_a_window_as_large_as_the_map_is_the_whole_map():
    whole, windowed = softmax_attention(site()), softmax_attention(site(block=1), window=(6, 8), shift=True)
    windowed.load_state_dict(whole.state_dict())
    x = torch.randn(2, 48, 16)
    torch.testing.assert_close(windowed(x, MAP).x, whole(x, MAP).x)


def test_the_bias_depends_on_the_offset_alone():
    mixer = softmax_attention(site(Grid(4, 4)), window=4, relative_position_bias=True)
    bias = mixer.core.bias()
    assert bias.shape == (2, 16, 16)
    assert torch.equal(bias[:, 0, 5], bias[:, 5, 10]) and torch.equal(bias[:, 3, 2], bias[:, 7, 6])
    assert not torch.equal(bias[:, 0, 1], bias[:, 1, 0])


def test_query_key_norm_makes_the_scale_of_queries_irrelevant():
    mixer = softmax_attention(site(), qk_norm=True, qkv_bias=False)
    x = torch.randn(1, 48, 16)
    before = mixer(x, MAP).x
    with torch.no_grad():
        mixer.qkv.weight[:32] *= 5
    torch.testing.assert_close(mixer(x, MAP).x, before, rtol=1e-3, atol=1e-4)


def test_wrong_options_are_named():
    with pytest.raises(Refused, match=r"need windows; set attention.window, or both to false"):
        softmax_attention(site(), shift=True)
    with pytest.raises(Refused, match=r"16 channels do not divide into 3 heads; change model.num_heads or model.dim"):
        softmax_attention(site(heads=3))
    with pytest.raises(ValueError, match=r"window must be a side of at least 1, or two, got 0; give a number"):
        softmax_attention(site(), window=0)
    with pytest.raises(TypeError, match=r"ChannelCore has no attention matrix"):
        dual_attention(site(block=1), cpe_kernel=0).attention_matrix(torch.randn(1, 48, 16), MAP)
