"""KERPLE in two dimensions: a learned kernel of the distance of query and key, two numbers per head.

Source: KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation, Chi et al., NeurIPS 2022,
arXiv:2205.09921, equations 8 and 9: −p log(1 + a d) or −a dᵖ with p ≤ 2; here d is the distance of two cells of a map,
so the same function holds on every map.
Shapes: M = heads, N = queries, S = keys.
The authors clamp the parameters in place in the forward pass, so that gradients flow at the clamp; so they do here.
Their causal form has distance 0 above the diagonal. Their further weight exp(−a′ dᵖ′) of the logits is no bias.
"""

import math

import torch
from torch import Tensor, nn

from conf import values
from models.attention.contract import Site
from models.attention.contract.places import OfOffset

KINDS = ("log", "power")
SMALLEST = 1e-2


def kerple(site: Site, *, kind: str = "log", norm: int = 2) -> "Kerple":
    """A bias that falls with the distance.

    Args:
        site: the place in the backbone.
        kind: "log" or "power".
        norm: of the distance: 2 for Euclid's, 1 for rows plus columns.

    Raises:
        ValueError: another kind or norm.
    """
    values.choice("kerple", "kind", kind, KINDS, fix="set attention.bias.kind")
    if norm not in (1, 2) or isinstance(norm, bool):
        values.refuse("kerple", "norm", "1 or 2", norm, "set attention.bias.norm")
    return Kerple(site.num_heads, kind, norm)


class Kerple(OfOffset):
    """Parameters p and a of every head; p ~ U(0, 2) and a ~ U(0, 1) at the start."""

    def __init__(self, num_heads: int, kind: str, norm: int) -> None:
        super().__init__()
        self.kind, self.norm = kind, norm
        self.p = nn.Parameter(2 * torch.rand(num_heads))
        self.a = nn.Parameter(torch.rand(num_heads))

    def at(self, offsets: Tensor) -> Tensor:
        """(M, …); see `OfOffset`."""
        distance = offsets.float().norm(p=self.norm, dim=-1)
        shape = (-1, *(1 for _ in distance.shape))
        p = _clamped(self.p, 2.0 if self.kind == "power" else math.inf).view(shape)
        a = _clamped(self.a).view(shape)
        return -p * torch.log1p(a * distance) if self.kind == "log" else -a * distance**p


def _clamped(x: Tensor, largest: float = math.inf) -> Tensor:
    """Clamped, with the gradient of what it was."""
    return x + (x.clamp(SMALLEST, largest) - x).detach()
