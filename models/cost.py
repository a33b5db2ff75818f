"""What a model costs: parameters, and multiply-adds of one image, which papers call FLOPs."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """All of them, trained or not."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def multiply_adds(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Of the matrix products and convolutions of one forward pass; norms and activations are not counted.

    The model may be on the meta device: nothing is computed then.
    """
    images = torch.zeros(1, 3, *image_size, device=next(model.parameters()).device)
    training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(images)
    model.train(training)
    return counter.get_total_flops() // 2
