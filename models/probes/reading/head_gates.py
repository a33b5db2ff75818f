"""What single heads are worth: the model without one, the gradient of its gate, and how it spreads its attention.

Source: Michel et al., Are Sixteen Heads Really Better than One?, NeurIPS 2019, arXiv:1905.10650: the importance of a
head is the mean over images of |∂L/∂ξ|, with ξ the gate of the head, 1 for all tokens.
Shapes: B = images, N = tokens, M = heads.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Mixer
from models.attention.contract import Grid
from models.attention.contract.places import places
from models.attention.recording import recorded
from models.probes.reading.head_loads import Loads

MOST_TOKENS = 4096  # of a map whose weights on one another are written out


class Heads(NamedTuple):
    """What was measured on `images` images, `top1` of all heads together.

    without: by layer, top-1 without each head. gradient: by layer, the mean of |∂L/∂gate| of each.
    """

    images: int
    top1: float
    without: dict[str, list[float]]
    gradient: dict[str, list[float]]


@contextmanager
def head_gates(mixers: dict[str, Mixer]) -> Iterator[dict[str, Tensor]]:
    """Inside, the heads of a mixer are weighted by what stands under its name in what it gives: (M,) or (B, M)."""
    gates: dict[str, Tensor] = {}
    handles = [
        mixer.register_forward_pre_hook(partial(_weight, gates, name), with_kwargs=True)
        for name, mixer in mixers.items()
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _weight(gates: dict[str, Tensor], name: str, mixer: Mixer, given: tuple, named: dict[str, Any]) -> tuple | None:
    if name not in gates:
        return None
    B, N, _ = given[0].shape
    gates_BM = gates[name].to(given[0].dtype).expand(B, -1)
    return given, named | {"gates_BNM": gates_BM[:, None].expand(-1, N, -1)}


def measured(
    model: nn.Module,
    mixers: dict[str, Mixer],
    batches: Iterable[tuple[Tensor, Tensor]],
    loads: Loads,
    tick: Callable[[], Any] = lambda: None,
) -> Heads:
    """The model as it is, without each head of these mixers, and its gradient by their gates.

    Args:
        model: a classifier in evaluation mode.
        mixers: by name, that take gates.
        batches: images and labels, on the device of the model.
        loads: counts what routers do in the model as it is.
        tick: called after every batch that passed without a head.
    """
    images, right = 0, 0
    lost = {name: torch.zeros(mixer.site.num_heads, dtype=torch.float64) for name, mixer in mixers.items()}
    gradient = {name: torch.zeros_like(count) for name, count in lost.items()}
    with head_gates(mixers) as gates:
        for batch, labels in batches:
            with loads.of(labels):
                right_B = _right(model, batch, labels)
            images, right = images + len(batch), right + int(right_B.sum())
            for name, of_batch in _without(model, mixers, gates, batch, labels, tick).items():
                lost[name] += of_batch
            for name, of_batch in _by_gates(model, mixers, gates, batch, labels).items():
                gradient[name] += of_batch
    count = max(images, 1)
    without = {name: (right_M / count).tolist() for name, right_M in lost.items()}
    sums = {name: (total / count).tolist() for name, total in gradient.items()}
    return Heads(images, right / count, without, sums)


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels_B: Tensor) -> Tensor:
    return model(images).argmax(-1) == labels_B


def _without(
    model: nn.Module,
    mixers: dict[str, Mixer],
    gates: dict[str, Tensor],
    images: Tensor,
    labels_B: Tensor,
    tick: Callable[[], Any],
) -> dict[str, Tensor]:
    """By layer, how many images are right without each head."""
    found = {}
    for name, mixer in mixers.items():
        each_MM = 1 - torch.eye(mixer.site.num_heads, device=images.device)
        counts = []
        for gates_M in each_MM:
            gates[name] = gates_M
            counts.append(_right(model, images, labels_B).sum().double())
            tick()
        del gates[name]
        found[name] = torch.stack(counts).cpu()
    return found


@torch.enable_grad()
def _by_gates(
    model: nn.Module, mixers: dict[str, Mixer], gates: dict[str, Tensor], images: Tensor, labels_B: Tensor
) -> dict[str, Tensor]:
    """By layer, the sum over images of |∂L/∂gate| of each head."""
    for name, mixer in mixers.items():
        gates[name] = torch.ones(len(images), mixer.site.num_heads, device=images.device, requires_grad=True)
    loss = F.cross_entropy(model(images).float(), labels_B, reduction="sum")
    found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
    sums = {name: grad_BM.abs().sum(0).cpu() for name, grad_BM in zip(gates, found, strict=True)}
    gates.clear()
    return sums


class Spread(NamedTuple):
    """How a head spreads its attention: the entropy of its rows in nats, and its mean distance in pixels, each (M,)."""

    entropy: list[float]
    distance: list[float]


@torch.no_grad()
def spreads(model: nn.Module, mixers: dict[str, Mixer], images: Tensor) -> dict[str, Spread]:
    """Of those mixers that have a matrix, on maps of at most `MOST_TOKENS`; means over images and queries."""
    found = {}
    with recorded(model) as calls:
        model(images)
    for name, mixer in mixers.items():
        x_BNC, grid = calls[name]
        if mixer.has_matrix and grid.tokens <= MOST_TOKENS:
            each = [spread(mixer.token_weights(x[None], grid).on_tokens(), grid, images.shape[-2:]) for x in x_BNC]
            entropy, distance = (torch.stack(values).mean(0).tolist() for values in zip(*each, strict=True))
            found[name] = Spread(entropy, distance)
    return found


def spread(weights_BMNN: Tensor, grid: Grid, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Entropy and distance of heads, each (M,).

    Weights that do not sum to one, or some of which are negative, count by their absolute share of the row. Class
    tokens have no place, so that the distance leaves them out.

    Args:
        weights_BMNN: of all tokens on all tokens.
        grid: of the tokens.
        size: height and width of the images in pixels.
    """
    shares = _shares(weights_BMNN.abs().float())
    entropy_M = torch.special.entr(shares).sum(-1).mean((0, 2))
    on_map = _shares(shares[:, :, grid.prefix :, grid.prefix :])
    at = places(grid, grid, shares.device) * torch.tensor([s / n for s, n in zip(size, grid[:2], strict=True)]).to(
        on_map
    )
    distance_M = (on_map * torch.cdist(at, at)).sum(-1).mean((0, 2))
    return entropy_M, distance_M


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
