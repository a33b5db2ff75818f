"""What a model costs: parameters, and multiply-adds of one image, which papers call FLOPs."""

import copy
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

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


def multiply_adds(model: nn.Module, image_size: Sequence[int]) -> int:
    """Of the matrix products and convolutions of one forward pass; norms and activations are not counted.

    Counted on a copy without memory, whose operations are PyTorch's own: those of fused kernels are not all known to
    the counter. The model, its state and the random numbers that follow stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            return _count(hollow(model), image_size)
        except Exception:  # an operation that needs numbers, say
            training = model.training
            try:
                return _count(model, image_size)
            finally:
                model.train(training)


def costs_of_modules(model: nn.Module, image_size: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Multiply-adds, and activations (numbers that convolutions and linear layers give), by the path of each module.

    Of one image; counted as `multiply_adds` counts, on a copy without memory.
    """
    bare, activations = hollow(model).eval(), dict.fromkeys(dict(model.named_modules()), 0)

    def hooked(path: str) -> Callable:
        ancestors = ["", *(path[:end] for end in (m.start() for m in re.finditer(r"\.", path))), path]

        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            for ancestor in ancestors:
                activations[ancestor] += output.numel()

        return count

    for path, module in bare.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.register_forward_hook(hooked(path))
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter,
    ):
        bare(*example_inputs(bare, image_size))
    counts = {path: sum(count.values()) // 2 for path, count in counter.get_flop_counts().items()}
    root = type(bare).__name__
    return {path: (counts.get(f"{root}.{path}" if path else root, 0), n) for path, n in activations.items()}


def hollow(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without memory; what is shared stays shared."""
    memo: dict[int, Tensor] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


@torch.no_grad()
def _count(model: nn.Module, image_size: Sequence[int]) -> int:
    inputs = example_inputs(model, image_size)
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# what torch's counter leaves out: attention on a CPU
UNKNOWN = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
