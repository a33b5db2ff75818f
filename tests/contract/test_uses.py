"""All that conf/ lists in uses beside training as usual: no images, halves, frozen weights, gradients of each image."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tests.contract.cases import CASES, another, moved

pytestmark = pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")  # slow under vmap, which is no matter
FEW = ("attention=moh", "attention=routing", "attention/pre, class token", "pool=slot")
NO_RULE = ("lit_32px",)  # vmap has none for torchvision's deformable convolution
each = pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in FEW else pytest.mark.full) for c in CASES])


@pytest.fixture
def made(case):
    module, given = CASES[case]()
    return moved(module), given


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def loss_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return sum(output.square().mean() for output in outputs(result))


def gradients(module: nn.Module, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of the loss in what is trained; zeros where it has no part in it."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss_of(module(*given)), list(trained.values()), allow_unused=True)
    pairs = zip(trained.items(), found, strict=True)
    return {name: torch.zeros_like(parameter) if g is None else g for (name, parameter), g in pairs}


@each
def test_no_images(made):
    module, given = made
    none = tuple(another(0, tensor) for tensor in given)
    for empty, usual in zip(outputs(module(*none)), outputs(module(*given)), strict=True):
        assert empty.shape == (0, *usual.shape[1:]) and empty.dtype == usual.dtype
    sum(empty.sum() for empty in outputs(module(*none))).backward()


@each
def test_half_precision(made):
    """Finite logits and gradients, on a CPU too."""
    module, given = made[0].half(), tuple(t.half() if t.is_floating_point() else t for t in made[1])
    results = outputs(module(*given))
    assert all(result.dtype == torch.half and result.isfinite().all() for result in results)
    sum(result.float().square().mean() for result in results).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("case", [c for c in each.args[1] if c.values[0] not in NO_RULE])
def test_gradients_of_each_image(made):
    """By vmap of grad, as differential privacy takes them: those of one image after the other.

    In float64, where no rounding puts a number on the other side of a ReLU or of a choice.
    """
    module, given = made[0].double(), tuple(t.double() if t.is_floating_point() else t for t in made[1])
    parameters, buffers = {name: p.detach() for name, p in module.named_parameters()}, dict(module.named_buffers())

    def loss(parameters: dict[str, Tensor], *one: Tensor) -> Tensor:
        return loss_of(functional_call(module, (parameters, buffers), tuple(tensor[None] for tensor in one)))

    found = vmap(grad(loss), in_dims=(None, *(0 for _ in given)))(parameters, *given)
    for image in range(2):
        for name, wanted in gradients(module, tuple(tensor[image : image + 1] for tensor in given)).items():
            torch.testing.assert_close(found[name][image], wanted, rtol=1e-3, atol=1e-4)


@each
def test_with_some_weights_frozen_the_others_have_their_gradients(made):
    module, given = made
    wanted = gradients(module, given)
    other = copy.deepcopy(module)
    for start in (0, 1):
        for number, parameter in enumerate(other.parameters()):
            parameter.requires_grad_(number % 2 == start)
        for name, found in gradients(other, given).items():
            if name in wanted:  # what a model never trains is asked for here, too
                torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-6)
