"""Efficient additive attention: what it does not depend on, what it costs, and its equation token by token."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.attention import Grid, Site, build
from models.attention.additive import AdditiveAttention

GRID = Grid(5, 7)
SITE = Site(16, 4, GRID, 0, 0, 1, "hierarchical")


def make() -> AdditiveAttention:
    torch.manual_seed(0)
    return AdditiveAttention(SITE).double()


def tokens(count: int = 35) -> torch.Tensor:
    return torch.randn(2, count, 16, dtype=torch.float64)


def test_it_is_the_equation():
    mixer, (x, _) = make(), tokens()
    q, k = (torch.stack([row / row.norm() for row in layer(x)]) for layer in (mixer.query, mixer.key))
    weights = q @ mixer.weight[:, 0] / 4
    vector = sum(weight / weights.norm() * row for weight, row in zip(weights, q, strict=True))
    expected = torch.stack([mixer.out(mixer.proj(vector * a) + b) for a, b in zip(k, q, strict=True)])
    torch.testing.assert_close(mixer(x[None], GRID).x[0], expected)


def test_tokens_in_another_order_give_the_same_in_that_order():
    mixer, x, order = make(), tokens(), torch.randperm(35)
    torch.testing.assert_close(mixer(x[:, order], GRID).x, mixer(x, GRID).x[:, order])


def test_the_length_of_the_learned_vector_does_not_matter():
    mixer, x = make(), tokens()
    before = mixer(x, GRID).x
    with torch.no_grad():
        mixer.weight.mul_(7)
    torch.testing.assert_close(mixer(x, GRID).x, before)


def test_its_cost_is_linear_in_tokens():
    counts = []
    for grid in (Grid(8, 8), Grid(16, 16)):
        with FlopCounterMode(display=False) as counter:
            make()(tokens(grid.tokens), grid)
        counts.append(counter.get_total_flops())
    assert counts[1] == 4 * counts[0]


def test_many_tokens_in_half_precision_are_summed_in_float32():
    mixer, x = make().to(torch.bfloat16), 0.1 * torch.randn(1, 4096, 16) + 1
    exact = make().float()
    exact.load_state_dict(mixer.state_dict())
    found, expected = mixer(x.bfloat16(), Grid(64, 64)).x.float(), exact(x.bfloat16().float(), Grid(64, 64)).x
    assert (found - expected).norm() < 0.02 * expected.norm()  # bfloat16 keeps 8 bits in each of five steps


def test_class_tokens_are_refused():
    with pytest.raises(ValueError, match=r"it works on the map alone and cannot take the 1 class token\(s\) in front"):
        build(AdditiveAttention, [SITE._replace(grid=Grid(5, 7, 1))])
