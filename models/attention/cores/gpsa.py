"""Gated positional self-attention: every head mixes attention by content with attention by position, by a learned gate.

Source: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, d'Ascoli et al., ICML 2021,
arXiv:2103.10697, section 3. With δ = (x, y) the offset of a key from the query,
    o = ((1 - σ(λ)) softmax(q kᵀ / √D) + σ(λ) softmax(w · (x, y, x² + y²))) v,   λ and w of every head
Shapes: B = batch, N = queries, S = keys, M = heads, D = channels per head.
Heads start as the taps of a k×k convolution, k = ⌊√M⌋: w = locality · (2 a, 2 b, -1) looks at the cell (a, b) away.
Values start as the tokens with initializer=gpsa. Left out, since they change nothing: the bias of w, which cancels in
the softmax, and the quotient by the row sum, which is one. The authors take maps for squares; here any map is itself.
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.window_attention import added_to_logits
from models.attention.assemble import Composition, assemble
from models.attention.contract import Accepts, Grid, Mixer, Runs, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME, SHORTENED
from models.attention.contract.places import OfOffset
from models.attention.multihead import Core


def gpsa_attention(site: Site, *, locality: float = 1.0, **composition: Unpack[Composition]) -> Mixer:
    """Attention that starts as a convolution; class tokens are refused, since they have no position.

    Args:
        site: the place in the backbone.
        locality: how sharply a head looks at its cell at the start; above 0. Paper: 1.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    values.number("gpsa", "locality", locality, 1e-6, fix="set attention.locality; the paper uses 1")
    dim, accepts = head_channels(site), Accepts(prefix="refused")
    return assemble(site, lambda heads, *_: GatedPositionalCore(heads, dim, locality), accepts=accepts, **composition)


class PositionLogits(OfOffset):
    """w · (x, y, x² + y²) of every head."""

    def __init__(self, num_heads: int, locality: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, 3))
        nn.init.trunc_normal_(self.weight, std=0.02)  # of heads beyond k²
        side = math.isqrt(num_heads)
        cells = torch.arange(side) - (side - 1) / 2
        x, y = cells.repeat_interleave(side), cells.repeat(side)
        with torch.no_grad():
            self.weight[: side * side] = locality * torch.stack([2 * x, 2 * y, -torch.ones(side * side)], dim=-1)

    def at(self, offsets: Tensor) -> Tensor:
        y, x = (-offsets.to(self.weight.dtype)).unbind(-1)
        return torch.einsum("mf,...f->m...", self.weight, torch.stack([x, y, x * x + y * y], dim=-1))


class GatedPositionalCore(Core):
    """Two softmaxes and their gate; that of positions, which is the same for all images, in float32 at least."""

    keys = frozenset({SAME, SHORTENED})
    masks = True
    row_stochastic = True

    def __init__(self, num_heads: int, head_dim: int, locality: float = 1.0) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.position = PositionLogits(num_heads, locality)
        self.gate = nn.Parameter(torch.ones(num_heads))

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `models.attention.multihead.Core`."""
        return Runs("scaled_dot_product_attention", False, "beside weights by position, one matrix for all images")

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None
    ) -> Tensor:
        closed, gate = added_to_logits(q_BMND, None, mask), self.gate.sigmoid().view(-1, 1, 1)
        by_content = F.scaled_dot_product_attention(q_BMND, k_BMSD, v_BMSD, closed, scale=self.scale)
        by_position = self._by_position(q_BMND, grid, kv_grid, mask).to(v_BMSD.dtype) @ v_BMSD
        return ((1 - gate) * by_content + gate * by_position).to(v_BMSD.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None) -> Tensor:
        """The weights (B, M, N, S)."""
        closed, gate = added_to_logits(q_BMND, None, mask), self.gate.sigmoid().view(-1, 1, 1)
        logits = q_BMND @ k_BMSD.mT * self.scale
        by_content = (logits if closed is None else logits + closed).softmax(-1)
        return (1 - gate) * by_content + gate * self._by_position(q_BMND, grid, kv_grid, mask)

    def _by_position(self, q_BMND: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None) -> Tensor:
        """Weights of every query on every key, (1, M, N, S), or (B, M, N, S) with a mask."""
        logits_MNS = self.position(grid, kv_grid)
        return added_to_logits(logits_MNS.new_empty(q_BMND.shape[0], 0), logits_MNS, mask).softmax(-1)
