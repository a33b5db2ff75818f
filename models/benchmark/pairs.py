"""Our models beside timm's of the same architecture: steps in turn, in one process, and how many times faster ours are.

Both have float32 weights of their own, no drop path, and the same random images.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model
from models.factory import compose_model

WARM_UP = 1  # pairs before the first that counts
STEPS = ("forward", "training")


class Pair(NamedTuple):
    """What the pairs of one step of one model gave: milliseconds (medians), and theirs ÷ ours (median, fifths)."""

    model: str
    timm: str
    step: str
    batch: int
    image_size: int
    ours_ms: float
    timm_ms: float
    ratio: float
    low: float
    high: float


def compare(
    ours: str, theirs: str, steps: Sequence[str], batch: int, pairs: int, device: torch.device
) -> Iterator[Pair]:
    """A row for each step.

    The two take turns in being the first of a pair, so that what else the machine does falls on both. With one thread
    on a CPU it is the CPU time of this process that counts, which the work of others changes little.

    Raises:
        ValueError: they do not have the same number of parameters.
    """
    with torch.device(device):
        models = create_model(ours, drop_path=0.0), _without_drop_path(timm.create_model(theirs))
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    if counts[0] != counts[1]:
        raise ValueError(
            f"models.benchmark: {ours} and timm's {theirs} must have the same number of parameters, got {counts[0]:,} "
            f"and {counts[1]:,}; mend models/benchmark/partners.py"
        )
    size = compose_model(ours, None).image_size
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    for step in steps:
        mine, other = timed([_call(step, model, images, labels) for model in models], pairs, device)
        ratios = [b / a for a, b in zip(mine, other, strict=True)]
        low, high = np.percentile(ratios, [20, 80])
        medians = (statistics.median(times) for times in (mine, other, ratios))
        yield Pair(ours, theirs, step, batch, size, *medians, float(low), float(high))


def timed(calls: Sequence[Callable[[], Any]], pairs: int, device: torch.device) -> tuple[list[float], ...]:
    """Milliseconds of each call in each round; the order turns around from round to round."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: tuple[list[float], ...] = tuple([] for _ in calls)
    for number in range(WARM_UP + pairs):
        order = range(len(calls)) if number % 2 else reversed(range(len(calls)))
        for i in order:
            wait()
            start = clock()
            calls[i]()
            wait()
            if number >= WARM_UP:
                times[i].append(1e3 * (clock() - start))
    return times


def _without_drop_path(model: nn.Module) -> nn.Module:
    """timm's models have rates of their own, and not all of them take another."""
    for part in model.modules():
        if isinstance(part, timm.layers.DropPath):
            part.drop_prob = 0.0
    return model


def _call(step: str, model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """`forward` in evaluation mode without gradients, or `training`: forward, cross entropy and backward."""

    @torch.inference_mode()
    def forward() -> None:
        model.eval()
        model(images)

    def training() -> None:
        model.train()
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    return {"forward": forward, "training": training}[step]
