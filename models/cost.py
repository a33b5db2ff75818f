"""What a model costs: parameters, and multiply-adds of one image, which papers call FLOPs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

STEPS = 1000  # timesteps that are drawn for a model that generates


def parameters(model: nn.Module) -> int:
    """All of them, trained or not."""
    return sum(p.numel() for p in model.parameters())


def image_channels(model: nn.Module) -> int:
    """Of the images that a model takes: its `in_channels`, or those of the first convolution of its stem."""
    if (said := getattr(model, "in_channels", None)) is not None:
        return said
    stem = getattr(model, "stem", model)
    return next((part.in_channels for part in stem.modules() if isinstance(part, nn.Conv2d)), 3)


def example_inputs(model: nn.Module, image_size: Sequence[int], batch: int = 1) -> tuple[Tensor, ...]:
    """Random numbers that a model can be called with, on its device, for images of (height, width) pixels.

    Images (B, channels, height, width); for a model that generates, the latents of such images (B, Z, H, W), timesteps
    (B,) and labels (B,).
    """
    device = next(model.parameters()).device
    if not getattr(model, "generates", False):
        return (torch.randn(batch, image_channels(model), *image_size, device=device),)
    latents = torch.randn(
        batch, model.in_channels, *(side // model.latent_stride for side in image_size), device=device
    )
    numbers = (torch.randint(count, (batch,), device=device) for count in (STEPS, model.num_classes))
    return (latents, *numbers)


@torch.no_grad()
def multiply_adds(model: nn.Module, image_size: Sequence[int]) -> int:
    """Of the matrix products and convolutions of one forward pass; norms and activations are not counted.

    The model may be on the meta device: nothing is computed then.
    """
    inputs = example_inputs(model, image_size)
    training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    model.train(training)
    return counter.get_total_flops() // 2
