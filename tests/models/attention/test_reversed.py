"""Reversed attention: what is conserved, what it is where it is symmetric, and what goes from block to block."""

import pytest
import torch
from torch import nn

from models import create_model
from models.attention import Grid, Site
from models.attention.contract.heads import merge_heads, split_heads
from models.attention.reversed import ReversedAttention

GRID = Grid(3, 5)
SITE = Site(16, 4, GRID, 0, 0, 1, "hierarchical")


@pytest.fixture
def mixer() -> ReversedAttention:
    torch.manual_seed(0)
    return ReversedAttention(SITE).double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, GRID.tokens, 16, dtype=torch.float64)


def test_a_token_sends_over_all_heads_what_it_has_to_say(mixer, x):
    matrix, m_BN1 = mixer.attention_matrix(x, GRID), mixer.messages(x)
    torch.testing.assert_close(matrix.sum((1, 2)), m_BN1.squeeze(-1))
    assert (m_BN1 > 0).all() and (m_BN1 < 1).all()


def test_with_even_heads_full_messages_and_symmetric_logits_it_is_softmax_attention(mixer, x):
    """Of all tokens alike, whose weights are symmetric, up to the share of a head."""
    nn.init.zeros_(mixer.head_selector.weight)
    nn.init.zeros_(mixer.message_controller.fc2.weight)  # m = 1/2, of 2 carried
    x = x[:, :1].expand_as(x) + 0
    v_BMND = split_heads(mixer.qkv(x), 3, 4)[2]
    expected = mixer.proj(merge_heads(v_BMND / 4))
    torch.testing.assert_close(mixer(x, GRID, carry=x.new_full((2, 15, 1), 2.0)).x, expected)


def test_messages_are_handed_on_and_only_fade(mixer, x):
    first = mixer(x, GRID).carry
    second = mixer(x, GRID, carry=first).carry
    torch.testing.assert_close(second, first.square())
    assert (second < first).all()
    nothing_left = mixer(x, GRID, carry=torch.zeros_like(first)).x
    torch.testing.assert_close(nothing_left, mixer.proj.bias.expand_as(nothing_left))


def test_a_low_temperature_sends_by_one_head(mixer, x):
    shares = ReversedAttention(SITE, temperature=1e-3).double()
    shares.load_state_dict(mixer.state_dict())
    sharp, usual = ((m.attention_matrix(x, GRID).sum(2) / m.messages(x).mT).amax(1) for m in (shares, mixer))
    assert sharp.mean() > 0.99 > 0.6 > usual.mean()


def test_recomputed_it_has_the_same_bits():
    images = torch.randn(2, 3, 32, 32)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = create_model("vit_32px", attention="reversed", depth=3, num_classes=3)
        model.set_gradient_checkpointing(recompute)
        logits = model.train()(images)
        logits.square().sum().backward()
        results.append((logits, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert len(results[0]) == len(results[1]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("temperature", [0, -1.0, "warm"])
def test_a_temperature_that_is_none_is_refused(temperature):
    message = rf"reversed: temperature must be a positive number, got {temperature!r}; set attention.temperature"
    with pytest.raises(ValueError, match=message):
        ReversedAttention(SITE, temperature=temperature)
