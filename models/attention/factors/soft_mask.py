"""Soft causal mask: weights on tokens that come later in raster order are multiplied by ρ.

Source: Adapting LLaMA Decoder to Vision Transformer, Wang et al., 2024, arXiv:2404.06773, section 3.5:
softmax(q kᵀ / √D) ∘ (ρ + (1 − ρ) tril).
Shapes: M = heads, N = queries, S = keys.
As in the authors' code the mask multiplies the softmax and nothing is divided again: later tokens stay in its sum, and
rows sum to less than one. There ρ falls from 1 to 0 in the first epochs; here it is one number. Class tokens in front
see, and are seen by, all.
"""

import torch
from torch import Tensor

from conf import values
from models.attention.contract import Site
from models.attention.contract.places import OfOffset


def soft_mask(site: Site, *, rho: float = 0.0) -> "SoftMask":
    """A factor of 1 on the tokens up to the query, and of ρ on later ones.

    Args:
        site: the place in the backbone.
        rho: ρ from 0, a causal mask, to 1, none.

    Raises:
        ValueError: ρ is no such number.
    """
    return SoftMask(site.num_heads, values.fraction("soft_mask", "rho", rho, fix="set attention.factor.rho"))


class SoftMask(OfOffset):
    """It has no parameters; the same for all heads."""

    neutral = 1.0

    def __init__(self, num_heads: int, rho: float) -> None:
        super().__init__()
        self.num_heads, self.rho = num_heads, rho

    def at(self, offsets: Tensor) -> Tensor:
        """(M, …); see `OfOffset`."""
        rows, columns = offsets.unbind(-1)
        earlier = (rows > 0) | ((rows == 0) & (columns >= 0))
        return torch.where(earlier, 1.0, self.rho).expand(self.num_heads, *earlier.shape)
