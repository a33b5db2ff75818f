"""Length-scaled cosine attention with a continuous relative position bias over the whole map.

Source: TransNeXt, Shi, CVPR 2024, arXiv:2311.17132, which has it in its last stage; the bias by an MLP of log-spaced
coordinates is from Swin Transformer V2, Liu et al., CVPR 2022, arXiv:2111.09883. With S keys,
    o = softmax(τ log(S) (q/‖q‖ + e) (k/‖k‖)ᵀ + bias(Δy, Δx)) v.

Shapes: B = batch, N = tokens, S = keys, C = channels, M = heads, D = channels per head, H W = map, Y X = map of keys.
"""

from collections.abc import Sequence
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import full_precision
from kernels.window_attention import added_to_logits
from models.attention.assemble import Composition, assemble
from models.attention.biases.continuous import ContinuousPositionBias, measured_in
from models.attention.contract import Accepts, Grid, Mixer, Runs, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SAME, SHORTENED
from models.attention.contract.options import check_whole
from models.attention.multihead import Core
from models.attention.scores.cosine import LengthScaled


def cosine_attention(
    site: Site,
    *,
    pretrain_size: int | Sequence[int] | None = None,
    hidden: int = 512,
    head_dim: int | None = None,
    **composition: Unpack[Composition],
) -> Mixer:
    """Cosine attention over the map; prefix tokens are refused, since they have no position.

    Args:
        site: the place in the backbone.
        pretrain_size: height and width of the map that distances are measured in: that of the weights' training, so
            that the same offset keeps its coordinate on a larger map. None for what the site says.
        hidden: hidden channels of the MLP of the bias.
        head_dim: channels per head D; C / M by default.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    check_whole("cosine", hidden=hidden, head_dim=1 if head_dim is None else head_dim)
    size = measured_in(site, pretrain_size)
    dim = head_dim or head_channels(site)
    accepts = Accepts(prefix="refused")
    return assemble(
        site, lambda heads, *_: CosineCore(heads, dim, size, hidden), head_dim=dim, accepts=accepts, **composition
    )


class CosineCore(LengthScaled, Core):
    """`softmax(τ log(S) (q̂ + e) k̂ᵀ + bias) v`; normalisation and scale in float32.

    τ = softplus(temperature) starts at 1 / 0.24; e, the query embedding, is one vector per head.
    """

    keys = frozenset({SAME, SHORTENED})
    masks = True
    row_stochastic = True

    def __init__(self, num_heads: int, head_dim: int, pretrain_size: tuple[int, int], hidden: int = 512) -> None:
        super().__init__()
        self.learn_scale(num_heads, head_dim)
        self.bias = ContinuousPositionBias(num_heads, pretrain_size, hidden)

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `Core`."""
        return Runs("scaled_dot_product_attention", False, "dense attention with a bias is PyTorch's own fused kernel")

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None
    ) -> Tensor:
        q, k, bias = (t.to(v_BMSD.dtype) for t in self._logit_terms(q_BMND, k_BMSD, grid, kv_grid))
        return F.scaled_dot_product_attention(q, k, v_BMSD, added_to_logits(q, bias, mask), scale=1.0)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None) -> Tensor:
        """The attention weights (B, M, N, S)."""
        q, k, bias = self._logit_terms(q_BMND, k_BMSD, grid, kv_grid)
        return (q @ k.mT + added_to_logits(q, bias, mask)).softmax(-1)

    def _logit_terms(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, unit keys and bias (M, N, S), in float32: the logits are q kᵀ + bias."""
        q, k = self.scaled(q_BMND, k_BMSD)
        with full_precision(q.device):
            bias = self.bias(grid, kv_grid).float()
        return q, k, bias
