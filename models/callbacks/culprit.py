"""Which module's numbers are the first that are not finite: the last pass of a model is made again and looked at.

Shapes: B = batch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Finding(NamedTuple):
    """Where numbers stop being finite, in words; `rows` (B,) says in which images, where that can be told."""

    where: str | None
    rows: Tensor | None


class LastPass:
    """What a model was called with last in training, its randomness, and the gradients that came back to its output.

    Holds references, so `forget` after each step; a compiled model is not looked at, since it calls no modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._busy = model, False
        self._hooks = [
            model.register_forward_pre_hook(self._called, with_kwargs=True),
            model.register_forward_hook(self._gave),
        ]
        self.forget()

    def forget(self) -> None:
        self._given: tuple[tuple, dict] | None = None
        self._random: list[Tensor] = []
        self._gradients: dict[int, Tensor] = {}

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.forget()

    def first_bad(self, context: Callable[[], AbstractContextManager]) -> Finding:
        """Makes the pass again, under `context()` of the precision; weights and their gradients stay as they are."""
        if self._given is None:
            return Finding(None, None)
        if (found := _input(self._given)) is not None:
            return found
        device = next(self.model.parameters()).device
        looks = Looks(self.model)
        self._busy = True
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), context():
                _set_random(self._random, device)
                outputs = list(tensors(self.model(*self._given[0], **self._given[1])))
            if looks.forward is not None:
                return Finding(looks.forward, _rows(outputs))
            return self._backward(outputs, looks)
        finally:
            self._busy = False
            looks.remove()

    def _backward(self, outputs: list[Tensor], looks: "Looks") -> Finding:
        if any(not torch.isfinite(gradient).all() for gradient in self._gradients.values()):
            return Finding("the loss of outputs that are finite", _rows(list(self._gradients.values())))
        places = [place for place in self._gradients if place < len(outputs) and outputs[place].requires_grad]
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        if places and weights:
            given = [self._gradients[place] for place in places]
            torch.autograd.grad([outputs[place] for place in places], weights, given, allow_unused=True)
        return Finding(looks.backward, None)

    def _called(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if model.training and torch.is_grad_enabled() and not self._busy:
            self._given, self._random = (args, kwargs), _random(args, kwargs)
            self._gradients = {}

    def _gave(self, model: nn.Module, args: tuple, output: Any) -> None:
        if model.training and torch.is_grad_enabled() and not self._busy:
            for place, tensor in enumerate(tensors(output)):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._gradients.__setitem__, place))


class Looks:
    """Hooks on every module, which note the first output and the first gradient that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.forward: str | None = None
        self.backward: str | None = None
        self._hooks = [
            module.register_forward_hook(partial(self._look, name or "the model"))
            for name, module in model.named_modules()
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, name: str, module: nn.Module, given: tuple, output: Any) -> None:
        called = f"{name} ({type(module).__name__})"
        for tensor in tensors(output):
            if self.forward is None and not torch.isfinite(tensor).all():
                largest = max((float(t.detach().abs().max()) for t in tensors(given) if t.numel()), default=0.0)
                self.forward = f"the output of {called}, whose input reaches {largest:.3g}"
            if tensor.requires_grad:
                tensor.register_hook(partial(self._look_back, called))

    def _look_back(self, called: str, gradient: Tensor) -> None:
        if self.backward is None and not torch.isfinite(gradient).all():
            self.backward = f"the gradient of the output of {called}"


def _input(given: tuple[tuple, dict]) -> Finding | None:
    bad = [tensor for tensor in tensors(list(given)) if not torch.isfinite(tensor).all()]
    return Finding("the images that the model is given", _rows(bad)) if bad else None


def _rows(found: list[Tensor]) -> Tensor | None:
    """Images in which a tensor is not finite, unless all are: then they tell nothing."""
    for tensor in found:
        if tensor.ndim > 1:
            rows = ~torch.isfinite(tensor.detach()).flatten(1).all(1)
            return rows if rows.any() and not rows.all() else None
    return None


def _random(args: tuple, kwargs: dict) -> list[Tensor]:
    device = next((tensor.device for tensor in tensors([args, kwargs])), torch.device("cpu"))
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def _set_random(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of real numbers in what a module takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)
