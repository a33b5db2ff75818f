"""Softplus weights with a scale that follows the length, sharpened by a power: stable at lengths not trained on.

Source: Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models, Gao et al., 2025,
arXiv:2501.13428 (LSSA, LSSAR): a = softplus(log N / log N₀ · s), rows divided by their sum; then aᵖ, likewise.
Shapes: B = batch, M = heads, N = queries, S = keys.
No code is public and only the abstract was at hand: N₀, the tokens that it is built for, so that nothing changes at
that size, and p = 3 are ours. As rows are divided by their sum at the end, once is enough: softmax(p log softplus(…)).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.precision import wide
from models.attention.contract import Site


def softplus(site: Site, *, power: float = 3.0) -> "SoftplusWeights":
    """Softplus of length-scaled logits, to a power, in rows that sum to one.

    Args:
        site: the place in the backbone, with the map that the core sees.
        power: p, at least 1; 1 does not sharpen (LSSA).

    Raises:
        ValueError: a power below 1.
    """
    values.number("softplus", "power", power, 1, fix="set attention.weights.power, e.g. 1 or 3")
    return SoftplusWeights(site.grid.tokens, power)


class SoftplusWeights(nn.Module):
    """Rows sum to one; closed pairs have weight 0."""

    row_stochastic = True

    def __init__(self, tokens: int, power: float) -> None:
        super().__init__()
        self.tokens, self.power = max(tokens, 2), power

    def forward(self, logits_BMNS: Tensor, open: Tensor | None) -> Tensor:
        logits = wide(logits_BMNS)
        scale = math.log(max(logits.shape[-1], 2)) / math.log(self.tokens)
        smallest = torch.finfo(logits.dtype).tiny
        sharpened = self.power * F.softplus(logits * scale).clamp_min(smallest).log()
        if open is not None:
            sharpened = sharpened.masked_fill(~open, -math.inf)
        return sharpened.softmax(-1)
