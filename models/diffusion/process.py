"""The diffusion process: noise is added step by step with variances β; a model that knows the noise goes back.

Source: DDPM, Ho et al., NeurIPS 2020, arXiv:2006.11239 (equations 4, 6, 7); learned variances, and chains that skip
steps: Improved DDPM, Nichol & Dhariwal, ICML 2021, arXiv:2102.09672 (equation 15, section 4).
The schedule of DiT (arXiv:2212.09748) and MoH-DiT: 1,000 linear variances from 1e-4 to 2e-2, tables in float64.

Shapes: B = batch, Z = channels of the data, H W = map, T = steps of this process.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conf.errors import UserError


class Step(NamedTuple):
    """What is known of the step before: its mean and log variance, and the data x0; each (B, Z, H, W)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class Diffusion(nn.Module):
    """Tables of one process.

    Args:
        betas_T: variances of the noise of each step, in (0, 1).
        timesteps_T: the timestep of the whole diffusion that each step stands for, which is what the model is told; all
            in order when None.

    Attributes:
        tables: by name (T,), float64 on the CPU. Rounded to float32 they follow the module to its device, and are in no
            checkpoint.

    Raises:
        ValueError: a variance out of range.
    """

    timesteps: Tensor

    def __init__(self, betas_T: Tensor, timesteps_T: Tensor | None = None) -> None:
        super().__init__()
        betas = betas_T.double()
        if betas.dim() != 1 or len(betas) < 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise UserError(f"Diffusion: betas must be a row of numbers in (0, 1), got {betas_T}; see linear_diffusion")
        self.tables = _tables(betas)
        for name, table in self.tables.items():
            self.register_buffer(f"table_{name}", table.float(), persistent=False)
        timesteps = torch.arange(len(betas)) if timesteps_T is None else timesteps_T
        self.register_buffer("timesteps", timesteps, persistent=False)

    def __len__(self) -> int:
        """T."""
        return len(self.timesteps)

    def respaced(self, timesteps: Sequence[int]) -> "Diffusion":
        """The process that visits only some steps, with the same noise at each of them; see `spaced`."""
        kept = torch.tensor(sorted(timesteps))
        alphas = self.tables["alphas_cumprod"][kept]
        betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
        return Diffusion(betas, self.timesteps.cpu()[kept]).to(self.timesteps.device)

    def at(self, name: str, step_B: Tensor) -> Tensor:
        """A table at some steps, (B, 1, 1, 1)."""
        return getattr(self, f"table_{name}")[step_B][:, None, None, None]

    def noised(self, x0: Tensor, step_B: Tensor, noise: Tensor) -> Tensor:
        """Data (B, Z, H, W) as it is after that many steps: √ᾱ x0 + √(1 − ᾱ) noise."""
        return self.at("signal", step_B) * x0 + self.at("noise", step_B) * noise

    def x0_from_noise(self, x: Tensor, step_B: Tensor, noise: Tensor) -> Tensor:
        """The inverse of `noised`."""
        return self.at("inverse_signal", step_B) * x - self.at("noise_to_signal", step_B) * noise

    def noise_from_x0(self, x: Tensor, step_B: Tensor, x0: Tensor) -> Tensor:
        """The noise that leads from x0 to x."""
        return (self.at("inverse_signal", step_B) * x - x0) / self.at("noise_to_signal", step_B)

    def posterior(self, x: Tensor, step_B: Tensor, x0: Tensor) -> Step:
        """The true step before x, given the data (DDPM, equation 7)."""
        mean = self.at("posterior_mean_coef1", step_B) * x0 + self.at("posterior_mean_coef2", step_B) * x
        return Step(mean, self.at("posterior_log_variance_clipped", step_B).expand_as(x), x0)

    def predicted(self, prediction: Tensor, x: Tensor, step_B: Tensor, clip: bool = False) -> Step:
        """The step before x, as a prediction says it.

        Args:
            prediction: the noise (B, Z, H, W); or 2·Z channels, in the second half of which -1 … 1 says where the log
                variance lies between the smallest and the largest that are possible (Improved DDPM, equation 15).
                Without it the variance is the largest.
            clip: keep x0 in -1 … 1, the range of pixels.
        """
        noise, *share = prediction.split(x.shape[1], dim=1)
        log_variance = self.at("log_largest", step_B).expand_as(x)
        if share:
            share_of_beta = (share[0] + 1) / 2
            smallest = self.at("posterior_log_variance_clipped", step_B)
            log_variance = share_of_beta * self.at("log_betas", step_B) + (1 - share_of_beta) * smallest
        x0 = self.x0_from_noise(x, step_B, noise)
        x0 = x0.clamp(-1, 1) if clip else x0
        return Step(self.posterior(x, step_B, x0).mean, log_variance, x0)


def _tables(betas: Tensor) -> dict[str, Tensor]:
    alphas = (1 - betas).cumprod(0)
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    variance = betas * (1 - before) / (1 - alphas)
    # the posterior of the first step has no variance: for the logarithm it takes that of the second
    clipped = variance.clone()
    clipped[0] = variance[1] if len(betas) > 1 else betas[0]
    return {
        "betas": betas,
        "log_betas": betas.log(),
        "alphas_cumprod": alphas,
        "alphas_cumprod_before": before,
        "signal": alphas.sqrt(),
        "noise": (1 - alphas).sqrt(),
        "inverse_signal": (1 / alphas).sqrt(),
        "noise_to_signal": (1 / alphas - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": clipped.log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas),
        "log_largest": torch.cat([clipped[:1], betas[1:]]).log(),
    }


def linear_diffusion(steps: int = 1000) -> Diffusion:
    """Linear variances, 1e-4 … 2e-2 for 1,000 steps; for another number as much noise in all.

    Raises:
        ValueError: too few steps for that noise.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps <= 20:
        raise UserError(f"diffusion: steps must be a whole number above 20, got {steps!r}; set task.diffusion_steps")
    scale = 1000 / steps
    return Diffusion(torch.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=torch.float64))
