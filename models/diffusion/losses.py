"""What a diffusion model minimises: the error of the noise, and for learned variances the variational bound.

Source: DDPM, Ho et al., arXiv:2006.11239 (equations 5 and 14); Improved DDPM, Nichol & Dhariwal, arXiv:2102.09672:
their bound reaches the variances only (L_hybrid, with the mean detached), here with weight 1 as in DiT and MoH-DiT.

Shapes: B = batch, Z = channels, H W = map.
"""

import math

import torch
from torch import Tensor

from conf.errors import UserError
from models.diffusion.process import Diffusion, Step

HALF_PIXEL = 1 / 255  # of 8-bit pixels in -1 … 1
LEAST = 1e-12  # of a probability, before its logarithm


def training_losses(
    diffusion: Diffusion, prediction: Tensor, x0: Tensor, x: Tensor, step_B: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """Per sample (B,): "mse" of the noise, and "vb" in bits per dimension when the variances are predicted too.

    Args:
        prediction: of the model for x, (B, Z or 2·Z, H, W).
        x0, x, noise: (B, Z, H, W); x is `diffusion.noised(x0, step_B, noise)`.

    Raises:
        ValueError: a prediction of another shape.
    """
    channels, *sides = x.shape[1:]
    if prediction.shape not in (x.shape, (len(x), 2 * channels, *sides)):
        raise UserError(
            f"training_losses: the prediction must have {channels} or {2 * channels} channels and the size of the "
            f"input {tuple(x.shape)}, got {tuple(prediction.shape)}; see model.in_channels and model.learn_sigma"
        )
    prediction = prediction.float()
    losses = {"mse": _mean((noise - prediction[:, :channels]).square())}
    if prediction.shape[1] > channels:
        frozen = torch.cat([prediction[:, :channels].detach(), prediction[:, channels:]], dim=1)
        predicted = diffusion.predicted(frozen, x, step_B)
        losses["vb"] = bound(diffusion.posterior(x, step_B, x0), predicted, x0, step_B)
    return losses


def bound(true: Step, predicted: Step, x0: Tensor, step_B: Tensor) -> Tensor:
    """One term of the variational bound per sample (B,), in bits per dimension.

    The divergence of the predicted from the true step before, and for the first step how unlikely the pixels are.
    """
    divergence = gaussian_kl(true.mean, true.log_variance, predicted.mean, predicted.log_variance)
    terms = torch.where((step_B == 0)[:, None, None, None], -pixel_log_likelihood(x0, predicted), divergence)
    return _mean(terms) / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 ‖ N2) per element, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2).square() * (-log_variance2).exp())


def pixel_log_likelihood(x0: Tensor, predicted: Step) -> Tensor:
    """log P(x0) per element for 8-bit pixels in -1 … 1: a Gaussian's mass around a pixel; the ends take the tails."""
    centred, per_deviation = x0 - predicted.mean, (-0.5 * predicted.log_variance).exp()
    upper, lower = (_normal_cdf((centred + half) * per_deviation) for half in (HALF_PIXEL, -HALF_PIXEL))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=LEAST).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the authors' code, within 2e-4 of the exact one."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean(x: Tensor) -> Tensor:
    """(B, …) → (B,)."""
    return x.flatten(1).mean(1)
