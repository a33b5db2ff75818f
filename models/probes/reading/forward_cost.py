"""What the forward pass of a model costs: parameters, multiply-adds, images per second."""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from data.view import seen
from models.cost import example_inputs, multiply_adds, parameters

SECONDS = 1.0  # that a model is timed for


def forward_cost(model: nn.Module, data: pl.LightningDataModule, trainer: pl.Trainer) -> dict[str, Any]:
    """`cost` at the size that the data is evaluated at, in the precision of the trainer, on its device."""
    size = data.evaluation.size or data.crop_size
    size = seen(data.view, size)
    with trainer.precision_plugin.forward_context():
        return cost(model, size, data.batch_size, trainer.strategy.root_device)


@torch.no_grad()
def cost(model: nn.Module, image_size: int | list[int], batch_size: int, device: torch.device) -> dict[str, Any]:
    """Parameters; multiply-adds of one image, as papers count FLOPs; images per second of the forward pass.

    The model is timed in evaluation mode for about a second on a batch of random inputs.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    model = model.eval().to(device)
    image, *others = example_inputs(model, size, batch_size)
    inputs = (image.contiguous(memory_format=torch.channels_last), *others)
    with torch.compiler.set_stance("force_eager"):  # what is compiled cannot be counted
        flops = multiply_adds(model, size)
    return {
        "parameters": parameters(model),
        "flops": flops,
        "images_per_second": _throughput(model, inputs),
    }


def rows_of_cost(figures: dict[str, Any]) -> dict[str, Any]:
    """As people read it."""
    return {
        "parameters": figures["parameters"],
        "FLOPs (multiply-adds)": f"{figures['flops'] / 1e9:.4g} G",
        "images/s (forward)": figures["images_per_second"],
    }


def _throughput(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Images per second; the device is waited for only once in eight passes, as in a real evaluation."""

    def wait() -> float:
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    model(*inputs)  # warm up
    start, passes = wait(), 0
    while (elapsed := wait() - start) < SECONDS:
        for _ in range(8):
            model(*inputs)
        passes += 8
    return passes * len(inputs[0]) / elapsed
