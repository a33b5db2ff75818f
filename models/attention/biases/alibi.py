"""ALiBi in two dimensions: logits fall with the distance of the cells, by a fixed slope per head.

Source: Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation, Press et al., ICLR
2022, arXiv:2108.12409, section 3; there the distance is that of two words, here Euclid's of two cells.
Shapes: M = heads, N = queries, S = keys.
"""

import torch
from torch import Tensor

from models.attention.contract import Site
from models.attention.contract.places import OfOffset


def alibi(site: Site) -> "Alibi":
    """−2^(−8 h / M) · distance for head h = 1 … M.

    Args:
        site: the place in the backbone.
    """
    return Alibi(site.num_heads)


class Alibi(OfOffset):
    """It has no parameters."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def at(self, offsets: Tensor) -> Tensor:
        """(M, …); see `OfOffset`."""
        distance = offsets.float().norm(dim=-1)
        heads = torch.arange(1, self.num_heads + 1, device=offsets.device)
        slopes = 2.0 ** (-8 * heads / self.num_heads)
        return -slopes.view(-1, *(1 for _ in distance.shape)) * distance
