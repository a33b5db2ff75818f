"""URPE: a learned factor on the weights for every offset, which makes attention with relative positions universal.

Source: Your Transformer May Not be as Powerful as You Expect, Luo et al., NeurIPS 2022, arXiv:2205.13401, equation 8:
softmax(q kᵀ / √D + B) ∘ C, with C a table of offsets that starts at 1 (`--constant-init-ur-attn` of the authors' code).
Shapes: M = heads, N = queries, S = keys; the table is (M, 2H − 1, 2W − 1), key minus query.
With B alone, rows of weights sum to one, so that a constant sequence gives the same output wherever a token stands.
"""

from torch import nn

from models.attention.contract import Site
from models.attention.contract.places import OffsetTable


def urpe(site: Site) -> "Urpe":
    """One factor per head and offset; on another map it is interpolated.

    Args:
        site: the place in the backbone, with the map that the core sees.
    """
    return Urpe(site.num_heads, tuple(site.grid[:2]))


class Urpe(OffsetTable):
    """Factors that start at 1; those of prefix tokens stay 1."""

    neutral = 1.0

    def __init__(self, num_heads: int, size: tuple[int, int]) -> None:
        super().__init__(num_heads, size)
        nn.init.ones_(self.table)
