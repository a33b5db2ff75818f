"""Weights that are a function of other, trained weights: `reparam(model) -> None`, and plain weights again by `fold`.

Every member registers a parametrisation of PyTorch's: `qkv.weight` becomes what its function makes of
`qkv.parametrizations.weight.original` and of the parameters beside it, wherever `qkv.weight` is read.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def fold(model: nn.Module) -> None:
    """Leaves plain weights in the place of parametrised ones, as they are in evaluation: the outputs stay."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        # a copy of a model shares its classes, from which PyTorch takes the property away
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        module.parametrizations.eval()
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


@torch.no_grad()
def adopt(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a reparametrised model the weights of a plain one: every parametrisation starts again from its weight."""
    left = dict(state)
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                setattr(module, name, left.pop(f"{path}.{name}"))
    missing, unexpected = model.load_state_dict(left, strict=False)
    wrong = unexpected + [name for name in missing if ".parametrizations." not in f".{name}"]
    if wrong:
        raise ValueError(f"adopt: the weights must be those of the plain model, got others: {wrong[0]}; fold a copy")


def is_reparametrised(model: nn.Module) -> bool:
    """Whether any weight is a function of others."""
    return any(parametrize.is_parametrized(module) for module in model.modules())
