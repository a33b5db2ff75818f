"""Chains from noise to samples: the ancestral one of DDPM, and DDIM, which needs fewer steps.

Source: DDPM, Ho et al., arXiv:2006.11239 (algorithm 2); DDIM, Song et al., ICLR 2021, arXiv:2010.02502 (equation 12).

Shapes: B = samples, Z = channels, H W = map.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from conf.errors import UserError
from models.diffusion.process import Diffusion, Step

METHODS = ("ddpm", "ddim")


class Noise:
    """Normal noise that belongs to the samples: sample i draws the same, whatever it is drawn with.

    Args:
        seed: of all samples.
        indices: of these samples, B of them.
        shape: of one, (Z, H, W).

    Every call gives the next draw (B, Z, H, W), made on the CPU.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63) for index in indices]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


def chain(
    predict: Callable[[Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    noise: Callable[[], Tensor],
    *,
    method: str = "ddpm",
    eta: float = 0.0,
    clip: bool = False,
) -> Iterator[Tensor]:
    """Samples (B, Z, H, W) after every step, from the last one to the first; the last that it gives are the result.

    Args:
        predict: `(x, timesteps (B,)) -> prediction`, the timesteps those of the whole diffusion.
        diffusion: the process to go back through, often a `respaced` one.
        noise: called once for the start, and once for each step of a method that draws.
        method: "ddpm" or "ddim".
        eta: of DDIM: 0 draws no noise, 1 is as noisy as DDPM.
        clip: keep the x0 that is predicted in -1 … 1.

    Raises:
        ValueError: see `check_chain`.
    """
    check_chain(method, eta)
    return _chain(predict, diffusion, noise, method == "ddim", eta, clip)


def check_chain(method: str, eta: float) -> None:
    """Refuses settings of a chain.

    Raises:
        ValueError: no such method, or eta out of range.
    """
    if method not in METHODS:
        raise UserError(
            f"sampling: method must be one of {', '.join(METHODS)}, got {method!r}; set task.sampling.method"
        )
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise UserError(f"sampling: eta must be in [0, 1], got {eta!r}; set task.sampling.eta")


@torch.no_grad()
def _chain(
    predict: Callable[[Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    noise: Callable[[], Tensor],
    ddim: bool,
    eta: float,
    clip: bool,
) -> Iterator[Tensor]:
    device = diffusion.timesteps.device
    x = noise().to(device)
    for step in reversed(range(len(diffusion))):
        step_B = torch.full((len(x),), step, device=device)
        predicted = diffusion.predicted(predict(x, diffusion.timesteps[step_B]).float(), x, step_B, clip)
        mean, deviation = _ddim(diffusion, predicted, x, step_B, eta) if ddim else _ddpm(predicted)
        draws = not ddim or eta > 0
        x = mean + deviation * noise().to(device) if draws and step > 0 else mean
        yield x


def _ddpm(predicted: Step) -> tuple[Tensor, Tensor]:
    return predicted.mean, (0.5 * predicted.log_variance).exp()


def _ddim(diffusion: Diffusion, predicted: Step, x: Tensor, step_B: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Towards x0 and away from it again along the same noise, with less of it by what is drawn anew."""
    alpha, before = diffusion.at("alphas_cumprod", step_B), diffusion.at("alphas_cumprod_before", step_B)
    deviation = eta * ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()
    noise = diffusion.noise_from_x0(x, step_B, predicted.x0)
    return before.sqrt() * predicted.x0 + (1 - before - deviation.square()).clamp(min=0).sqrt() * noise, deviation
