"""Chains: where a perfect prediction leads, how much noise is drawn, and whose it is."""

import pytest
import torch

from models.diffusion import Noise, chain, linear_diffusion, spaced
from models.diffusion.sampling import _ddim

SHORT = linear_diffusion().respaced(spaced(6, 1000))
SHAPE = (2, 4, 4)


def oracle(x0: torch.Tensor, seen: list[int] | None = None):
    """Predicts the noise that there really is between x0 and x."""

    def predict(x: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        step_B = torch.searchsorted(SHORT.timesteps, timesteps_B)
        if seen is not None:
            seen.append(int(timesteps_B[0]))
        return SHORT.noise_from_x0(x, step_B, x0)

    return predict


@pytest.mark.parametrize(("method", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_a_perfect_prediction_leads_to_the_data(method, eta):
    x0, seen = torch.rand(3, *SHAPE) * 2 - 1, []
    steps = list(chain(oracle(x0, seen), SHORT, Noise(0, range(3), SHAPE), method=method, eta=eta))
    assert len(steps) == 6 and seen == SHORT.timesteps.flip(0).tolist()
    # the last step of DDPM's mean, and of DDIM's, is x0 as it is predicted
    torch.testing.assert_close(steps[-1], x0, atol=1e-4, rtol=1e-4)
    assert (steps[0] - x0).abs().mean() > 0.1


def test_ddim_draws_nothing_and_with_eta_one_as_much_as_ddpm():
    draws = []

    def noise() -> torch.Tensor:
        draws.append(1)
        return torch.zeros(1, *SHAPE)

    for method, eta, number in [("ddim", 0.0, 1), ("ddim", 0.5, 6), ("ddpm", 0.0, 6)]:
        draws.clear()
        list(chain(oracle(torch.zeros(1, *SHAPE)), SHORT, noise, method=method, eta=eta))
        assert len(draws) == number  # the start, and every step but the last
    x, step_B = torch.randn(5, *SHAPE), torch.arange(1, 6)
    x0 = torch.randn_like(x)
    mean, deviation = _ddim(SHORT, SHORT.posterior(x, step_B, x0), x, step_B, eta=1.0)
    torch.testing.assert_close(mean, SHORT.posterior(x, step_B, x0).mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(deviation.flatten(), SHORT.tables["posterior_variance"][1:].sqrt().float())


def test_noise_belongs_to_the_samples():
    together, first, second = (Noise(7, numbers, SHAPE) for numbers in (range(4), range(3), [3]))
    for _ in range(2):
        torch.testing.assert_close(together(), torch.cat([first(), second()]), rtol=0, atol=0)
    a, b = Noise(7, [0], SHAPE)(), Noise(8, [0], SHAPE)()
    assert not torch.equal(a, b) and not torch.equal(a, Noise(7, [1], SHAPE)())
    large = Noise(0, range(50), (1, 32, 32))()
    assert abs(float(large.mean())) < 0.02 and float(large.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "euler"}, "method must be one of ddpm, ddim, got 'euler'; set task.sampling.method"),
        ({"method": "ddim", "eta": -0.1}, r"eta must be in \[0, 1\], got -0.1; set task.sampling.eta"),
        ({"method": "ddim", "eta": 2}, r"eta must be in \[0, 1\], got 2"),
    ],
)
def test_wrong_chains(settings, text):
    with pytest.raises(ValueError, match=f"^sampling: {text}"):
        chain(oracle(torch.zeros(1)), SHORT, Noise(0, [0], SHAPE), **settings)
