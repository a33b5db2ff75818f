"""How often heads that are routed are used: of all images, and of those of each class.

Shapes: B = images, N = tokens, M = heads, K = classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from models.attention.head_router import HeadRouter
from models.callbacks.routing import Layer, layer_of
from models.probes.drawing.charts import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 40  # classes up to which columns are named


class Loads:
    """What the routers of a model do in the forward passes inside `with loads.of(labels)`, one batch each."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        self.routers = {
            name.removesuffix(".router"): module
            for name, module in model.named_modules()
            if isinstance(module, HeadRouter)
        }
        self.used = {name: torch.zeros(num_classes, router.num_heads) for name, router in self.routers.items()}
        self.images_K = torch.zeros(num_classes)
        self.batches: list[tuple[int, dict[str, Layer]]] = []

    @contextmanager
    def of(self, labels_B: Tensor) -> Iterator[None]:
        """Counts a forward pass of images of these classes."""
        labels = labels_B.cpu()
        handles = [
            router.register_forward_hook(partial(self._count, name, labels)) for name, router in self.routers.items()
        ]
        for router in self.routers.values():
            router.watch()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            seen = {name: layer_of(name, router) for name, router in self.routers.items()}
        self.images_K += torch.bincount(labels, minlength=len(self.images_K))
        self.batches.append((len(labels), seen))

    def _count(self, name: str, labels_B: Tensor, router: nn.Module, given: tuple, found: tuple) -> None:
        self.used[name].index_add_(0, labels_B, (found[0] > 0).float().mean(1).cpu())

    def layers(self) -> list[Layer]:
        """Of all images, by layer."""
        total = sum(count for count, _ in self.batches)
        found = []
        for name, router in self.routers.items():
            each = [(count / total, layers[name]) for count, layers in self.batches]
            load = [sum(share * layer.load[head] for share, layer in each) for head in range(router.num_heads)]
            entropy, margin = (sum(share * getattr(layer, of) for share, layer in each) for of in ("entropy", "margin"))
            found.append(Layer(name, load, router.shared, entropy, margin))
        return found

    def of_classes(self) -> dict[str, Tensor]:
        """By layer, the share of the tokens of the images of each class that use each head, (K, M); NaN without any."""
        return {name: used / self.images_K[:, None] for name, used in self.used.items()}


def chart_of_classes(of_classes: dict[str, Tensor], layers: list[Layer], names: list[str]) -> Figure:
    """A map: a row for each routed head of each layer, a column for each class that there is."""
    rows = [(layer, head) for layer in layers for head in range(layer.shared, len(layer.load))]
    load_RK = torch.stack([of_classes[layer.name][:, head] for layer, head in rows]).numpy()
    kept = np.flatnonzero(~np.isnan(load_RK).all(0)).tolist()
    figure = canvas(3.0 + min(9.0, 0.3 * len(kept)), 1.6 + min(12.0, 0.16 * len(rows)))
    axis = figure.subplots()
    image = axis.imshow(load_RK[:, kept], vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set(title="tokens that use a routed head, by class")
    axis.set_yticks(range(len(rows)), [f"{layer.name} {head}" for layer, head in rows], fontsize=6)
    if len(kept) <= NAMED:
        axis.set_xticks(range(len(kept)), [names[label] for label in kept], rotation=90, fontsize=7)
    figure.colorbar(image, ax=axis)
    return figure
