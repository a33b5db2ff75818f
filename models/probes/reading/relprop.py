"""Relevance backwards through single operations: what they gave is divided among what they were given.

Source: the rules of Chefer et al., Transformer Interpretability Beyond Attention Visualization, CVPR 2021,
arXiv:2012.09838, equations 3 to 9 (deep Taylor decomposition; the alpha-beta rule with alpha = 1), and of the authors'
code, hila-chefer/Transformer-Explainability. Softmax, LayerNorm, GELU and scales pass relevance on as it is.
Shapes: B = batch, N = tokens, C = channels in, O = channels out, H W = image, Y X = map of its patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 1e-9  # added to what is divided by


def share(relevance: Tensor, whole: Tensor) -> Tensor:
    """relevance / whole, and 0 where there is no whole to be a share of."""
    near = torch.where(whole < 0, whole - LEAST, whole + LEAST)
    return torch.where(whole == 0, 0, relevance / near)


def linear(x_BNC: Tensor, weight_OC: Tensor, relevance_BNO: Tensor) -> Tensor:
    """Equation 5: to inputs by their products with weights of the same sign; the bias has no part."""
    grows, falls = weight_OC.clamp(min=0), weight_OC.clamp(max=0)
    above, below = x_BNC.clamp(min=0), x_BNC.clamp(max=0)
    part = share(relevance_BNO, F.linear(above, grows) + F.linear(below, falls))
    return above * (part @ grows) + below * (part @ falls)


def product(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Of `a @ b`: half to each factor, within it in proportion to the products."""
    part = share(relevance, a @ b) / 2
    return a * (part @ b.mT), b * (a.mT @ part)


def added(a: Tensor, b: Tensor, relevance: Tensor, coupled: bool = False) -> tuple[Tensor, Tensor]:
    """Of `a + b`: to each in proportion, then scaled so that both keep their signs' share and nothing is lost.

    Equations 8 and 9 say so of one image. The authors' code sums over the batch too, so that the map of an image
    depends on its neighbours: with `coupled` so does this.
    """
    axes = tuple(range(0 if coupled else 1, a.dim()))
    part = share(relevance, a + b)
    of_a, of_b = a * part, b * part
    sum_a, sum_b = (t.sum(axes, keepdim=True) for t in (of_a, of_b))
    whole, both = relevance.sum(axes, keepdim=True), sum_a.abs() + sum_b.abs()
    return of_a * share(share(sum_a.abs(), both) * whole, sum_a), of_b * share(share(sum_b.abs(), both) * whole, sum_b)


def mean(x_BNC: Tensor, relevance_BC: Tensor) -> Tensor:
    """Of the mean over tokens: in proportion to what each adds to it."""
    return x_BNC * share(relevance_BC, x_BNC.sum(1))[:, None]


def pixels(images_BCHW: Tensor, patches: nn.Conv2d, relevance_BOYX: Tensor) -> Tensor:
    """Of a convolution of images, whose values lie between a least and a largest: the z^B rule, summed over channels.

    Source: Montavon et al., Pattern Recognition 2017, arXiv:1512.02479, equation 14.
    """
    low, high = (
        bound(images_BCHW, (1, 2, 3), keepdim=True).expand_as(images_BCHW) for bound in (torch.amin, torch.amax)
    )
    weights = (patches.weight, patches.weight.clamp(min=0), patches.weight.clamp(max=0))
    terms = [(images_BCHW, weights[0], 1), (low, weights[1], -1), (high, weights[2], -1)]
    geometry = {"stride": patches.stride, "padding": patches.padding}
    whole = sum(sign * F.conv2d(x, weight, **geometry) for x, weight, sign in terms)
    part = share(relevance_BOYX, whole)
    return sum(sign * x * F.conv_transpose2d(part, weight, **geometry) for x, weight, sign in terms).sum(1)
