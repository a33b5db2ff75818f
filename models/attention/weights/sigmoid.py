"""Sigmoid weights: every pair by itself, without a quotient over the keys.

Source: Theory, Analysis, and Best Practices for Sigmoid Self-Attention, Ramapuram et al., ICLR 2025, arXiv:2409.04431,
equation 3: σ(s eᵗ + b) with b = −log N, so that a row of zero logits sums to about 1 (to N / 2 with b = 0).
Shapes: B = batch, M = heads, N = queries, S = keys.
The authors' code keeps the b of the tokens that it was built for, at every resolution (`fixed`); t is a constant, 0.
"""

import math

import torch
from torch import Tensor, nn

from conf import values
from kernels.dense_attention import sigmoid_attention, sigmoid_weights
from models.attention.contract import Site

BIASES = ("fixed", "tokens", "learned")
WHO = "sigmoid"


def sigmoid(site: Site, *, bias: str | float = "fixed", temperature: float = 0.0) -> "SigmoidWeights":
    """σ(s eᵗ + b).

    Args:
        site: the place in the backbone, with the map that the core sees.
        bias: b: "fixed", −log of the tokens that it is built for; "tokens", −log of the keys at hand; "learned", one
            number per head that starts as "fixed"; or a number.
        temperature: t.

    Raises:
        ValueError: a bias or a temperature that is none.
    """
    if not values.is_number(bias):
        values.choice(WHO, "bias", bias, BIASES, fix="set attention.weights.bias to one of these, or to a number")
    values.number(WHO, "temperature", temperature, -math.inf, what="a number", fix="set attention.weights.temperature")
    return SigmoidWeights(site.num_heads, site.grid.tokens, bias, temperature)


class SigmoidWeights(nn.Module):
    """Closed pairs have weight 0; rows do not sum to one. `fused` is attention with them, by a kernel."""

    row_stochastic = False

    def __init__(self, num_heads: int, tokens: int, bias: str | float, temperature: float) -> None:
        super().__init__()
        self.factor, self.counts = math.exp(temperature), bias == "tokens"
        start = -math.log(tokens) if isinstance(bias, str) else bias
        if bias == "learned":
            self.bias = nn.Parameter(torch.full((num_heads, 1, 1), start))
        else:
            self.bias = start

    def forward(self, logits_BMNS: Tensor, open: Tensor | None) -> Tensor:
        return sigmoid_weights(logits_BMNS, open, bias=self._bias(logits_BMNS.shape[-1]), factor=self.factor)

    def fused(self, qkv_BNC: Tensor, num_heads: int, scale: float) -> Tensor:
        """(B, N, 3·M·D) → (B, N, M·D)."""
        bias = self._bias(qkv_BNC.shape[1])
        return sigmoid_attention(qkv_BNC, num_heads, bias=bias, factor=self.factor, scale=scale)

    def _bias(self, keys: int) -> float | Tensor:
        return -math.log(keys) if self.counts else self.bias
