"""Batch norms folded into the products in front of them: in evaluation both are one linear function.

So are branches of convolutions that are added up, see `models.layers.dilated_reparam`.

Source: SHViT, Yun & Ro, CVPR 2024, arXiv:2401.16456, and LeViT, arXiv:2104.01136, which are measured in this form.
Shapes: O = output channels, C = input channels.
"""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.layers.norm import TokenBatchNorm

PRODUCTS, NORMS = (nn.Linear, nn.Conv2d), (nn.BatchNorm1d, nn.BatchNorm2d, TokenBatchNorm)


@torch.no_grad()
def fold_norms(model: nn.Module) -> int:
    """Folds every batch norm behind a product into it, and that of pooled features into the head behind it.

    Products and norms are neighbours in an `nn.Sequential`, or are named by the `FOLDS` of a module. Branches with
    norms of their own, which a module with a method `merged` adds up, become one convolution first. A model that is
    folded computes the same as before in evaluation, and cannot be trained.

    Returns:
        How many norms were folded.

    Raises:
        ValueError: the model is in training, or has no such norms.
    """
    if model.training:
        raise UserError("fold_norms: the model must be in evaluation, got one in training; call model.eval() first")
    branches = _merge(model)
    places = [(module, *names) for module in model.modules() for names in _pairs(module)]
    for module, product, norm in places:
        setattr(module, product, behind(getattr(module, product), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
    head, norm = getattr(model, "head", None), getattr(model, "head_norm", None)
    if of_head := isinstance(norm, NORMS) and isinstance(head, nn.Linear):
        model.head, model.head_norm = _in_front(head, norm), nn.Identity()
    if not (branches or places or of_head):
        who = type(model).__name__
        raise UserError(f"fold_norms: a batch norm must stand behind a product, got none in {who}; leave it as it is")
    return branches + len(places) + of_head


def _merge(model: nn.Module) -> int:
    """One convolution in the place of each sum of branches; how many norms that folds."""
    found = [
        (module, name, part)
        for module in model.modules()
        for name, part in module.named_children()
        if hasattr(part, "merged")
    ]
    for module, name, part in found:
        setattr(module, name, part.merged())
    return sum(isinstance(inner, NORMS) for _, _, part in found for inner in part.modules())


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """The names of the products in a module with the norms behind them."""
    if isinstance(module, nn.Sequential):
        names = list(module._modules)
        pairs = list(pairwise(names))
    else:
        pairs = list(getattr(module, "FOLDS", ()))
    return [
        (product, norm)
        for product, norm in pairs
        if isinstance(getattr(module, product), PRODUCTS) and isinstance(getattr(module, norm), NORMS)
    ]


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm multiplies by, and what it adds."""
    norm = getattr(norm, "bn", norm)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return factor, norm.bias - norm.running_mean * factor


def behind(product: nn.Module, norm: nn.Module) -> nn.Module:
    """A product and the norm behind it: factor · (W x + b) + added, as a product with a bias."""
    factor_O, added_O = _affine(norm)
    bias = added_O if product.bias is None else added_O + factor_O * product.bias
    weight = product.weight * factor_O.view(-1, *[1] * (product.weight.ndim - 1))
    return _with(product, weight, bias)


def _in_front(head: nn.Linear, norm: nn.Module) -> nn.Linear:
    """W (factor · x + added) + b, as a product with a bias."""
    factor_C, added_C = _affine(norm)
    bias = head.weight @ added_C
    return _with(head, head.weight * factor_C, bias if head.bias is None else bias + head.bias)


def _with(product: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    made = copy.deepcopy(product)
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made
