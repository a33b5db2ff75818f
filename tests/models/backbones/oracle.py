"""Compares a whole model with timm's of the same architecture: one set of weights, float64, logits and all gradients.

Weights at their initial values hide mistakes: layer scales of 1e-5, zero biases and tables, gates that are shut. So
timm's model is first filled such that an error of one percent anywhere shows in the logits, and its batch norms are
given the statistics of what they see. Float64, because batch norms and ReLU amplify rounding errors a thousandfold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from models import create_model
from models.checkpoints import convert

LOGITS, GRADIENT = 1e-5, 1e-3  # of the largest logit, and of the norm of each gradient; rounding is below 1e-9
SCALES = ("gamma", "layer_scale", "alpha")
Fill = Callable[[str, Tensor], bool]


def equal(
    name: str,
    theirs: nn.Module,
    size: int | tuple[int, int],
    *,
    at: tuple[int, int] | None = None,
    own: Fill | None = None,
    seed: int = 0,
    images: int = 2,
    **settings: Any,
) -> tuple[float, float]:
    """Asserts that our model with timm's weights gives timm's logits and gradients, of images and of every weight.

    Returns the largest errors of logits and of gradients, as they are compared.

    Args:
        name: of our model.
        theirs: timm's, in which the weights are filled.
        size: pixels that ours is built for.
        at: pixels of the images; None for `size`.
        own: fills a weight of timm's that needs other values, in place, and says whether it did; see `filled`.
        seed: of the weights and images.
        images: how many.
        settings: of `create_model`, besides 1000 classes.
    """
    side = at or (size if isinstance(size, tuple) else (size, size))
    theirs = filled(theirs, side, own=own, seed=seed).double().eval()
    ours = create_model(name, image_size=size, **settings).double().eval()
    learned = {key for key, _ in theirs.named_parameters()}
    state = {key: value.detach().clone().requires_grad_(key in learned) for key, value in theirs.state_dict().items()}
    converted = convert(state, name, image_size=size, **settings)
    assert set(converted) == set(ours.state_dict())
    generator = torch.Generator().manual_seed(seed + 1)
    batch = torch.randn(images, 3, *side, generator=generator, dtype=torch.float64)
    weights = [value for key, value in state.items() if key in learned]
    expected, *wanted = _gradients(theirs, state, batch, weights)
    found, *gradients = _gradients(ours, converted, batch, weights)
    of_logits, of_gradients = ((found - expected).abs().max() / expected.abs().max()).item(), 0.0
    assert of_logits <= LOGITS, f"{name}: logits differ by {of_logits:.2e} of the largest"
    floor = 1e-9 * max(gradient.norm() for gradient in wanted)
    for key, ours_, theirs_ in zip(
        ["the images", *(key for key in state if key in learned)], gradients, wanted, strict=True
    ):
        error = ((ours_ - theirs_).norm() / theirs_.norm().clamp_min(floor)).item()
        assert error <= GRADIENT, f"{name}: the gradient of {key} differs by {error:.2e} of its norm"
        of_gradients = max(of_gradients, error)
    return of_logits, of_gradients


def _gradients(
    model: nn.Module, state: dict[str, Tensor], batch: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Logits, and the gradients of a sum of them with respect to the images and the weights."""
    images = batch.clone().requires_grad_()
    logits = functional_call(model, state, (images,))
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=logits.dtype)
    asked = [images, *weights]
    gradients = torch.autograd.grad((logits * direction).sum(), asked, allow_unused=True, materialize_grads=True)
    return logits.detach(), *gradients


@torch.no_grad()
def filled(model: nn.Module, size: tuple[int, int], *, own: Fill | None = None, seed: int = 0) -> nn.Module:
    """timm's model with weights that hide nothing, and batch norms with statistics of images of this size."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m._parameters.get("weight")) for m in model.modules() if _is_norm(m)}
    for key, parameter in model.named_parameters():
        if own is None or not own(key, parameter):
            _fill(key, parameter, id(parameter) in norms, generator)
    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if batch_norms:
        _calibrate(model, batch_norms, torch.randn(4, 3, *size, generator=generator), generator)
    return model


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)) or "Norm" in type(module).__name__


def _fill(key: str, parameter: Tensor, is_norm: bool, generator: torch.Generator) -> None:
    leaf, where = key.rpartition(".")[2], key.lower()
    if is_norm:
        parameter.normal_(0.9, 0.15, generator=generator)
    elif any(word in leaf or f"{word}." in where or where.endswith(word) for word in SCALES):
        parameter.uniform_(0.4, 0.6, generator=generator)
    elif "temperature" in leaf:
        parameter.normal_(2.0, 0.5, generator=generator)
    elif "gating" in leaf:
        parameter.uniform_(-0.7, 0.7, generator=generator)
    elif leaf == "bias":
        parameter.uniform_(-0.15, 0.15, generator=generator)
    elif parameter.ndim < 2 or any(word in where for word in ("table", "pos_embed.", "token")):
        parameter.normal_(0, 1, generator=generator)
    else:
        gain = 2.0 if any(word in where for word in ("qkv", "query", "key", ".q.", ".k.", ".qk.", ".kv.")) else 0.6
        parameter.normal_(0, gain * parameter[0].numel() ** -0.5, generator=generator)


def _calibrate(model: nn.Module, norms: list[nn.Module], images: Tensor, generator: torch.Generator) -> None:
    """Statistics of seeded images, moved a little, so that both a wrong mean and a wrong variance show."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_min_(0.01)
        norm.running_mean.add_(norm.running_var.sqrt(), alpha=0.05)
        norm.running_var.mul_(0.85 + 0.4 * torch.rand(norm.running_var.shape, generator=generator))
    model.eval()
