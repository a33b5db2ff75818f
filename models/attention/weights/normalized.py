"""Normalised weights: every row has a learned mean and deviation, so that heads leave the hull of their values.

Source: Normalized Attention Without Probability Cage, Richter & Wattenhofer, 2020, arXiv:2005.09561, equation 5:
    A = g (S − mean S) / (std S + 1e-3) + b,   S = q kᵀ without 1 / √D, means over the open keys of a row.
Shapes: B = batch, M = heads, N = queries, S = keys.
The released block has LayerNorm and GELU between heads and projection; `attention=normalized` has them as options.
Deviations are those of the population. Closed pairs have weight 0 and are not counted.
"""

import torch
from torch import Tensor, nn

from kernels.precision import wide
from models.attention.contract import Site
from models.attention.contract.heads import head_channels

EPSILON = 1e-3  # relative to logits without 1 / √D


def normalized(site: Site) -> "NormalizedWeights":
    """Rows with mean b and deviation g, one of each per head, 0 and 1 at the start.

    Args:
        site: the place in the backbone.
    """
    return NormalizedWeights(site.num_heads, head_channels(site))


class NormalizedWeights(nn.Module):
    """Logits come with 1 / √D, which is taken back."""

    row_stochastic = False

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.scale = head_dim**0.5
        self.gain = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, 1))

    def forward(self, logits_BMNS: Tensor, open: Tensor | None) -> Tensor:
        logits = wide(logits_BMNS) * self.scale
        counted = torch.ones_like(logits[:1, :1, :1]) if open is None else open.to(logits.dtype)
        keys = counted.sum(-1, keepdim=True)
        centred = (logits - (logits * counted).sum(-1, keepdim=True) / keys) * counted
        # the root of a row without deviation has no gradient
        variance = centred.square().sum(-1, keepdim=True) / keys
        deviation = variance.clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
        return (self.gain * centred / (deviation + EPSILON) + self.bias) * counted
