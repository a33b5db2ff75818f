"""Fixed-point attention: rounds that converge, what stops, the last round's gradient, softmax attention with one."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.attention import Grid, Site
from models.attention.cores.fixed_point import FixedPointCore, fixed_point_attention
from models.attention.softmax import softmax_attention

GRID = Grid(4, 5)
SITE = Site(32, 4, GRID, 0, 1, 2, "hierarchical")


def heads(size: float = 1.0) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [size * torch.randn(3, 4, 20, 8, dtype=torch.float64, generator=made) for _ in range(2)]


def matrix(rounds: int, q: Tensor, k: Tensor, tolerance: float | None = None) -> Tensor:
    return FixedPointCore(8, rounds, tolerance, 4096).eval().matrix(q, k, GRID, GRID)


def test_one_round_is_softmax_attention():
    torch.manual_seed(0)
    mixer, usual = fixed_point_attention(SITE, rounds=1), softmax_attention(SITE)
    usual.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 20, 32, requires_grad=True)
    found, expected = mixer(x, GRID).x, usual(x, GRID).x
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)), rtol=1e-4, atol=1e-5
    )


def test_weights_come_to_a_point_that_another_round_leaves():
    q, k = heads()
    found = [matrix(rounds, q, k) for rounds in range(1, 14)]
    steps = [float((after - before).norm()) for before, after in pairwise(found)]
    assert all(later < earlier for earlier, later in pairwise(steps))
    assert steps[0] > 0.5 and steps[-1] < 1e-4
    last = found[-1]
    torch.testing.assert_close(((last @ q) @ k.mT * 8**-0.5).softmax(-1), last, rtol=0, atol=1e-4)


def test_a_head_stays_where_a_round_changes_little_whatever_the_others_do():
    q, k = heads()
    q = torch.cat([q[:1], 0.01 * q[1:2], q[2:]])
    found = matrix(9, q, k, tolerance=0.05)
    alone = [matrix(9, q[i : i + 1], k[i : i + 1], tolerance=0.05) for i in range(3)]
    torch.testing.assert_close(found, torch.cat(alone))
    training = FixedPointCore(8, 9, 0.05, 4096).matrix(q, k, GRID, GRID)  # which does not ask who still moves
    assert torch.equal(training, found)
    assert torch.equal(found[1], matrix(3, q, k)[1]) and not torch.equal(found[1], matrix(9, q, k)[1])
    torch.testing.assert_close(matrix(9, q, k, tolerance=1e-12), matrix(9, q, k))


def test_a_tolerance_saves_rounds_in_evaluation(monkeypatch):
    calls, core = [], FixedPointCore(8, 50, 0.05, 4096).eval()
    weights = core.weights
    monkeypatch.setattr(core, "weights", lambda *given: calls.append(1) or weights(*given))
    core.matrix(*heads(), GRID, GRID)
    assert 3 <= len(calls) < 15


def test_the_gradient_is_that_of_the_last_round():
    q, k = (t.requires_grad_() for t in heads())
    target = torch.randn(3, 4, 20, 20, dtype=torch.float64)
    found = torch.autograd.grad((matrix(5, q, k) * target).sum(), (q, k))
    last = ((matrix(4, q, k).detach() @ q) @ k.mT * 8**-0.5).softmax(-1)
    expected = torch.autograd.grad((last * target).sum(), (q, k))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_where_rounds_change_little_it_is_nearly_that_of_all_rounds():
    q, k = (t.requires_grad_() for t in heads(0.3))
    target = torch.randn(3, 4, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((matrix(8, q, k) * target).sum(), k)
    A = (q @ k.mT * 8**-0.5).softmax(-1)
    for _ in range(7):
        A = ((A @ q) @ k.mT * 8**-0.5).softmax(-1)
    (unrolled,) = torch.autograd.grad((A * target).sum(), k)
    assert (found - unrolled).norm() < 0.1 * unrolled.norm()


def test_pairs_that_a_shifted_window_closes_have_no_weight():
    torch.manual_seed(0)
    grid = Grid(6, 6)
    mixer = fixed_point_attention(SITE._replace(grid=grid), window=3, shift=True)
    x = torch.randn(2, 36, 32)
    weights, usual = (m.token_weights(x, grid).weights for m in (mixer, softmax_attention(SITE, window=3, shift=True)))
    assert torch.equal(weights > 0, usual > 0) and (weights == 0).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("tolerance", [0, -1.0, "small"])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    message = rf"fixed_point: tolerance must be a positive number, or null, got {tolerance!r}; set attention.tolerance"
    with pytest.raises(ValueError, match=message):
        fixed_point_attention(SITE, tolerance=tolerance)


def test_no_rounds_and_keys_of_another_map_are_refused():
    with pytest.raises(ValueError, match=r"fixed_point: rounds must be a whole number of at least 1, got 0"):
        fixed_point_attention(SITE, rounds=0)
    with pytest.raises(ValueError, match=r"FixedPointCore cannot work on keys that are not its queries \(shortened\)"):
        fixed_point_attention(SITE, sr_ratio=2)
    with pytest.raises(ValueError, match=r"write out the weights of 20 x 20 pairs"):
        fixed_point_attention(SITE, max_tokens=10)
