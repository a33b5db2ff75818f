"""SEA, as it is read here: what the estimate is, what it chooses, and how it learns."""

import math

import pytest
import torch
from torch import Tensor, nn

from models.attention import Grid, Refused, Site
from models.attention.sea import SEAAttention, chosen, estimation, on_tokens
from models.attention.softmax import softmax_attention
from models.layers.random_features import RandomFeatures, orthogonal

MAP = Grid(5, 7, prefix=1)
SITE = Site(dim=32, num_heads=4, grid=MAP, stage=0, block=0, depth=2, kind="vit")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, MAP.tokens, 32)


def test_features_estimate_softmax_attention() -> None:
    """The more of them, the better."""
    q, k, v = torch.randn(3, 2, 2, 24, 8).unbind(0)
    q, k = q / 2, k / 2  # of long ones the products vary too much
    exact = (q @ k.mT * 8**-0.5).softmax(-1) @ v
    errors = [float((RandomFeatures(8, n)(q, k, v) - exact).norm() / exact.norm()) for n in (16, 256, 4096)]
    assert errors[0] > errors[1] > 2 * errors[2] and errors[2] < 0.06


def test_features_are_drawn_at_right_angles_once_and_kept() -> None:
    rows = orthogonal(20, 8)
    angles = rows[:8] @ rows[:8].mT
    torch.testing.assert_close(angles, angles.diagonal().diag(), rtol=0, atol=1e-5)
    assert rows.shape == (20, 8) and rows.norm(dim=1).std() > 0.1
    assert "estimator.performer.projection" in SEAAttention(SITE).state_dict()


def test_all_keys_and_no_mean_are_softmax_attention(x: Tensor) -> None:
    ours, softmax = SEAAttention(SITE, keys=MAP.tokens).eval(), softmax_attention(SITE)
    ours.load_state_dict(softmax.state_dict(), strict=False)
    nn.init.constant_(ours.estimator.scale.bias, 40.0)
    torch.testing.assert_close(ours(x, MAP).x, softmax(x, MAP).x)


@pytest.mark.parametrize("keys", [1, 3, 7])
def test_a_query_sees_its_budget_which_heads_share(keys: int, x: Tensor) -> None:
    mixer = SEAAttention(SITE, keys=keys).eval()
    scores, _ = mixer.estimator(*mixer.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4))
    seen = on_tokens(chosen(scores.softmax(-1), keys))
    assert scores.shape[-1] == MAP.tokens and (seen.sum((1, 3)) == 4 * keys).all()
    assert (seen.sum(-1) != keys).any()


@pytest.mark.parametrize("length", [9, 16, 35])
def test_a_column_stands_for_its_tokens(length: int, x: Tensor) -> None:
    """All tokens have one, in order, and each column nearly as many."""
    columns = torch.arange(length).expand(1, 1, 36, -1)
    place = on_tokens(columns)[0, 0, 0]
    counts = place.bincount(minlength=length)
    assert place.tolist() == sorted(place.tolist()) and counts.max() - counts.min() <= 1 and counts.min() >= 1
    mixer = SEAAttention(SITE, keys=4, length=length).eval()
    budget = 4 * round(4 * length / 36)
    scores, _ = mixer.estimator(*mixer.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4))
    assert (chosen(scores.softmax(-1), 4).sum((1, 3)) == budget).all()


def test_weights_times_values_are_the_output(x: Tensor) -> None:
    mixer = SEAAttention(SITE).eval()
    weights = mixer.attention_matrix(x, MAP)
    torch.testing.assert_close(mixer.attend(weights, x, MAP), mixer(x, MAP).x)
    own, mixed = mixer.estimator(*mixer.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4))[1].sigmoid().unbind(-1)
    sums = weights.sum(-1)
    with_keys = torch.isclose(sums, mixed * own + 1 - mixed, atol=1e-5)
    torch.testing.assert_close(sums[~with_keys], (1 - mixed)[~with_keys])  # a head without a key has the mean alone
    assert with_keys.any()


def test_the_estimate_is_a_whole_matrix_that_learns_the_softmax_of_its_layer() -> None:
    torch.manual_seed(0)
    mixer, x = SEAAttention(SITE), 2 * torch.randn(8, MAP.tokens, 32)
    nn.init.normal_(mixer.qkv.weight, std=0.15)
    q, k = mixer.qkv(x).detach().unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)[:2]
    exact = (q @ k.mT * 8**-0.5).softmax(-1)
    optimizer = torch.optim.Adam(mixer.estimator.parameters(), 3e-3)

    @torch.no_grad()
    def divergence() -> float:
        estimate = mixer.estimate(x, MAP)
        torch.testing.assert_close(estimate.sum(-1), torch.ones(estimate.shape[:-1]))
        return float((exact * (exact / estimate).log()).sum(-1).mean())

    before = divergence()
    for _ in range(60):
        optimizer.zero_grad()
        mixer(x, MAP).losses["estimation"].backward()
        optimizer.step()
    assert divergence() < 0.7 * before


def test_the_loss_is_the_sum_of_both_and_has_no_gradient_through_the_teacher(x: Tensor) -> None:
    mixer = SEAAttention(SITE)
    q, k, v = mixer.qkv(x).detach().unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
    q.requires_grad_()
    scores, _ = mixer.estimator(q, k, v)
    exact, ours = (q @ k.mT * 8**-0.5).softmax(-1), on_tokens(scores).softmax(-1)
    wanted = 0.1 * (exact * (exact / ours).log()).sum(-1).mean() + (exact - ours).square().mean()
    torch.testing.assert_close(estimation(scores, q, k), wanted)
    assert torch.autograd.grad(estimation(scores.detach().requires_grad_(), q, k), q, allow_unused=True)[0] is None
    mixed = mixer(x, MAP)
    (mixed.x.square().mean() + mixed.losses["estimation"]).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in mixer.parameters())
    assert not mixer.eval()(x, MAP).losses


def test_images_do_not_see_each_other_and_other_maps_run(x: Tensor) -> None:
    mixer = SEAAttention(SITE, length=16).eval()
    torch.testing.assert_close(mixer(x[1:], MAP).x, mixer(x, MAP).x[1:])
    for grid in (Grid(9, 9, 1), Grid(2, 3, 1)):
        assert mixer(torch.randn(2, grid.tokens, 32), grid).x.isfinite().all()


def test_a_large_map_is_refused() -> None:
    with pytest.raises(Refused, match=r"sea writes out the weights of 36 x 36 pairs, more than max_tokens=30 allows"):
        SEAAttention(SITE, max_tokens=30)
    with pytest.raises(ValueError, match=r"sea: keys must be a whole number of at least 1, got 0; set attention.keys"):
        SEAAttention(SITE, keys=0)
    assert SEAAttention(SITE).estimator.performer.projection.shape == (int(8 * math.log(8)), 8)
