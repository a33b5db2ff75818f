"""Processes and their losses: what equations promise, whatever the model is."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from models.diffusion import Diffusion, linear_diffusion, spaced, training_losses
from models.diffusion.losses import bound, pixel_log_likelihood
from models.diffusion.process import Step

WHOLE = linear_diffusion()
SHAPE = (3, 2, 4, 4)
STEPS = torch.tensor([0, 500, 999])


def test_noise_is_added_and_taken_off():
    x0, noise = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    x = WHOLE.noised(x0, STEPS, noise)
    signal = WHOLE.tables["alphas_cumprod"][STEPS].sqrt().float()[:, None, None, None]
    torch.testing.assert_close(x, signal * x0 + (1 - signal**2).sqrt() * noise, atol=1e-4, rtol=1e-4)
    # at the end hardly anything of x0 is left, and dividing by it multiplies the rounding
    torch.testing.assert_close(WHOLE.x0_from_noise(x, STEPS, noise), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(WHOLE.noise_from_x0(x, STEPS, x0), noise, atol=1e-4, rtol=1e-4)


def test_the_posterior_is_bayes():
    """q(x_{t-1} | x_t, x0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x0): the product of two Gaussians."""
    t, x0, x = 400, 0.3, -0.7
    beta, before = WHOLE.tables["betas"][t], WHOLE.tables["alphas_cumprod"][t - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() * x / beta + before.sqrt() * x0 / (1 - before)) / precision
    full = torch.ones(1, 1, 1, 1)
    found = WHOLE.posterior(x * full, torch.tensor([t]), x0 * full)
    assert float(found.mean) == pytest.approx(float(mean), rel=1e-5)
    assert float(found.log_variance) == pytest.approx(-math.log(precision), rel=1e-5)


def test_respacing_keeps_the_noise_of_the_steps_that_stay():
    kept = spaced(20, 1000)
    short = WHOLE.respaced(kept)
    assert len(short) == 20 and short.timesteps.tolist() == kept
    torch.testing.assert_close(short.tables["alphas_cumprod"], WHOLE.tables["alphas_cumprod"][kept])
    again = WHOLE.respaced(spaced("", 1000))
    torch.testing.assert_close(again.tables["betas"], WHOLE.tables["betas"], rtol=1e-10, atol=0)
    assert short.respaced([0, 19]).timesteps.tolist() == [0, 999]


@pytest.mark.parametrize(
    ("spacing", "steps", "found"),
    [
        ("", 5, [0, 1, 2, 3, 4]),
        (4, 10, [0, 3, 6, 9]),
        ("1", 10, [0]),
        ("2,3", 11, [0, 5, 6, 8, 10]),  # sections of 6 and 5
        ("ddim5", 1000, [0, 200, 400, 600, 800]),
        ("3", 1000, [0, 500, 999]),  # half of 999 is rounded to the even number
    ],
)
def test_spacings(spacing, steps, found):
    assert spaced(spacing, steps) == found


@pytest.mark.parametrize(
    ("spacing", "text"),
    [
        (1001, "from 1 to 1000 steps fit into the diffusion of 1000, got 1001; set task.sampling.steps"),
        ("600,10", "from 1 to 500 steps fit into a section of the diffusion of 1000, got 600"),
        (0, "from 1 to 1000 steps fit into the diffusion of 1000, got 0"),
        ("fast", "must be empty, numbers of steps such as 250 or '10,20', or 'ddim50', got 'fast'"),
        (2.5, "must be empty, numbers of steps"),
        (True, "must be empty, numbers of steps"),
        ("ddim333", "no whole stride gives 333 of 1000 steps, got 'ddim333'; set task.sampling.steps=333"),
        ("ddim0", "no whole stride gives 0 of 1000 steps"),
    ],
)
def test_wrong_spacings(spacing, text):
    with pytest.raises(ValueError, match=f"^spacing: .*{text}"):
        spaced(spacing, 1000)


def test_wrong_processes():
    with pytest.raises(
        ValueError, match=r"^Diffusion: betas must be a row of numbers in \(0, 1\), got .*; see linear_diffusion"
    ):
        Diffusion(torch.tensor([0.5, 1.0]))
    for steps in (20, 0, "many", 100.0):
        with pytest.raises(
            ValueError, match=r"^diffusion: steps must be a whole number above 20, got .*diffusion_steps"
        ):
            linear_diffusion(steps)
    with pytest.raises(ValueError, match=r"must have 2 or 4 channels .*got \(3, 3, 4, 4\); see model.in_channels"):
        training_losses(WHOLE, torch.zeros(3, 3, 4, 4), *[torch.zeros(SHAPE)] * 2, STEPS, torch.zeros(SHAPE))


def test_learned_variances_lie_between_the_posterior_and_beta():
    x = torch.randn(SHAPE)
    for share, name in [(-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")]:
        prediction = torch.cat([torch.randn(SHAPE), torch.full(SHAPE, share)], dim=1)
        found = WHOLE.predicted(prediction, x, STEPS).log_variance
        torch.testing.assert_close(found[:, 0, 0, 0], WHOLE.tables[name][STEPS].float())
    fixed = WHOLE.predicted(torch.randn(SHAPE), x, STEPS).log_variance[:, 0, 0, 0].exp()
    largest = [WHOLE.tables["posterior_variance"][1], *WHOLE.tables["betas"][STEPS[1:]]]
    torch.testing.assert_close(fixed, torch.stack(largest).float())


def test_a_clipped_prediction_stays_in_the_range_of_pixels():
    step = WHOLE.predicted(torch.randn(SHAPE), 3 * torch.randn(SHAPE), STEPS, clip=True)
    assert step.x0.abs().max() == 1


def test_the_bound_is_the_divergence_in_bits():
    true, predicted = (Step(torch.randn(SHAPE), torch.randn(SHAPE), torch.zeros(SHAPE)) for _ in range(2))
    normals = [Normal(step.mean, (0.5 * step.log_variance).exp()) for step in (true, predicted)]
    wanted = kl_divergence(*normals).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(bound(true, predicted, torch.zeros(SHAPE), torch.tensor([1, 2, 3])), wanted)


def test_the_first_step_is_the_probability_of_the_pixels():
    """All 256 values of a pixel together have probability 1, up to the approximation of the normal distribution."""
    values = (torch.arange(256) / 127.5 - 1)[:, None, None, None]
    for mean, deviation in [(0.0, 0.1), (0.9, 0.3), (-1.0, 0.02)]:
        step = Step(torch.full_like(values, mean), torch.full_like(values, 2 * math.log(deviation)), values)
        assert float(pixel_log_likelihood(values, step).exp().sum()) == pytest.approx(1, abs=1e-4)
    far = bound(step, step, values, torch.zeros(256, dtype=torch.long))
    assert far.argmin() == 0 and far.max() == pytest.approx(-math.log2(1e-12), rel=1e-3)


def test_the_bound_trains_the_variances_only():
    x0, noise = torch.rand(SHAPE), torch.randn(SHAPE)
    prediction = torch.randn(3, 4, 4, 4, requires_grad=True)
    parts = training_losses(WHOLE, prediction, x0, WHOLE.noised(x0, STEPS, noise), STEPS, noise)
    (grad,) = torch.autograd.grad(parts["vb"].sum(), prediction)
    assert (grad[:, :2] == 0).all() and (grad[1:, 2:] != 0).all()
    torch.testing.assert_close(parts["mse"], (noise - prediction[:, :2]).square().flatten(1).mean(1))
    assert set(training_losses(WHOLE, prediction[:, :2], x0, x0, STEPS, noise)) == {"mse"}


def test_tables_are_in_no_checkpoint():
    assert not WHOLE.state_dict()
