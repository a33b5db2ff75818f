"""Mimetic initialisation: products of projections that look like those of trained attention.

Source: Mimetic Initialization of Self-Attention Layers, Trockman & Kolter, ICML 2023, arXiv:2305.09828, section 3:
W_Q W_Kᵀ ≈ α Z + β I of every head, cut to rank D, and W_V W_proj ≈ α' Z' − β' I, each split by its singular values; so
tokens look at their like, and a block takes a part of its input away. No code of the authors was at hand: α, β and
the sines and cosines in place of a learned position table are known second-hand.
The code that circulates (osiriszjq/structured_init) gives V and proj the factors without transposing them, so that
tokens meet R L in place of L R: the same trace, another matrix. `as_circulated` does so too.
Shapes: C = channels, M = heads, D = channels per head, K = rank.
"""

import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.attention.projections import Projections, projections
from models.layers.position import LearnedPosition
from models.layers.sinusoid import position_table


@torch.no_grad()
def mimetic(
    model: nn.Module,
    *,
    alpha_qk: float = 0.7,
    beta_qk: float = 0.7,
    alpha_v: float = 0.4,
    beta_v: float = 0.4,
    position: bool = False,
    as_circulated: bool = False,
) -> None:
    """Sets `qkv` and `proj` of every mixer of a built model, with biases of zero. Meant for softmax of dot products.

    Args:
        model: a built model.
        alpha_qk, beta_qk: of noise and identity in W_Q W_Kᵀ.
        alpha_v, beta_v: of noise and identity in W_V W_proj.
        position: let a learned position table start as sines and cosines.
        as_circulated: without the two transposes that the circulating code forgets.

    Raises:
        ValueError: an option is none, or a mixer without such projections, or with more inner than outer channels.
    """
    factors = {"alpha_qk": alpha_qk, "beta_qk": beta_qk, "alpha_v": alpha_v, "beta_v": beta_v}
    for name, value in factors.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UserError(f"mimetic: {name} must be a number of at least 0, got {value!r}; set initializer.{name}")
    for name, value in {"position": position, "as_circulated": as_circulated}.items():
        if not isinstance(value, bool):
            raise UserError(f"mimetic: {name} must be true or false, got {value!r}; set initializer.{name}")
    places = projections(model, "mimetic", "initializer")
    for place in places:
        dim, inner, out = place.qkv.in_features, place.inner, place.proj.out_features
        if out != dim or inner > dim:
            raise UserError(
                f"mimetic: heads must have no more channels than tokens, and a projection back to all of these, got "
                f"{dim} → {inner} → {out} in {place.name}; set initializer=none"
            )
    for place in places:
        _queries_and_keys(place, alpha_qk, beta_qk)
        _values(place, alpha_v, beta_v, as_circulated)
        for bias in filter(lambda bias: bias is not None, (place.qkv.bias, place.proj.bias)):
            bias.zero_()
    for table in (m for m in model.modules() if position and isinstance(m, LearnedPosition)):
        height, width, prefix = table.grid
        table.table[:, prefix:] = position_table(height, width, table.table.shape[-1], table.table.device)


def product(noise: Tensor, alpha: float, beta: float) -> Tensor:
    """α Z + β I with Z = noise / √C; noise is (…, C, C) with unit variance."""
    dim = noise.shape[-1]
    return alpha * noise / dim**0.5 + beta * torch.eye(dim, dtype=noise.dtype, device=noise.device)


def split(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (…, C, K) and R (…, K, C) with L R = the product (…, C, C) cut to rank K, half of the values each."""
    left, values, right = torch.linalg.svd(product)
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :]


def _queries_and_keys(place: Projections, alpha: float, beta: float) -> None:
    weight, heads, dim = place.qkv.weight, place.num_heads, place.qkv.in_features
    noise = torch.randn(heads, dim, dim, dtype=weight.dtype, device=weight.device)
    left_MCD, right_MDC = split(product(noise, alpha, beta), place.inner // heads)
    weight[: place.inner] = left_MCD.mT.flatten(0, 1)
    weight[place.inner : 2 * place.inner] = right_MDC.flatten(0, 1)


def _values(place: Projections, alpha: float, beta: float, as_circulated: bool) -> None:
    weight, dim = place.qkv.weight, place.qkv.in_features
    noise = torch.randn(dim, dim, dtype=weight.dtype, device=weight.device)
    left_CK, right_KC = split(product(noise, alpha, -beta), place.inner)
    if as_circulated and place.inner == dim:
        left_CK, right_KC = left_CK.mT, right_KC.mT
    weight[2 * place.inner :] = left_CK.mT  # a Linear computes x Wᵀ
    place.proj.weight.copy_(right_KC.mT)
