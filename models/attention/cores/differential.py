"""Differential attention: the difference of two softmax maps, so that what both attend to cancels.

Source: Differential Transformer, Ye et al., ICLR 2025, arXiv:2410.05258, equations 1 to 3:
    o = (1 − λ₀) RMSNorm((softmax(q₁ k₁ᵀ / √d) − λ softmax(q₂ k₂ᵀ / √d)) v),   d = D / 2,
    λ = exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ₀,   λ₀ = 0.8 − 0.6 exp(−0.3 l)  of layer l = 0, 1, …
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head.
The authors halve the number of heads to keep the parameters of softmax attention; here a head's D channels are two
halves of queries and keys, which is the same with half of `model.num_heads`. `dual_lambda` is timm's: exp(a) − exp(b).
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window_attention import added_to_logits
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Refused, Runs, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.options import check_flags, check_whole
from models.attention.multihead import Core


def differential_attention(
    site: Site,
    *,
    qk_norm: bool = False,
    dual_lambda: bool = False,
    head_dim: int | None = None,
    **composition: Unpack[Composition],
) -> Mixer:
    """Two softmax maps, one minus λ times the other.

    Args:
        site: the place in the backbone; its block is the layer of λ₀.
        qk_norm: RMSNorm on queries and keys.
        dual_lambda: two numbers make λ instead of four vectors.
        head_dim: channels per head D; C / M by default.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.

    Raises:
        Refused: an odd number of channels per head.
    """
    check_flags("differential", qk_norm=qk_norm, dual_lambda=dual_lambda)
    check_whole("differential", head_dim=1 if head_dim is None else head_dim)
    dim = head_dim or head_channels(site)
    if dim % 2:
        raise Refused(
            f"differential: {dim} channels per head do not divide into two halves",
            "change model.num_heads or attention.head_dim",
        )

    def core(*_: object) -> DifferentialCore:
        return DifferentialCore(dim, site.block, qk_norm=qk_norm, dual_lambda=dual_lambda)

    return assemble(site, core, head_dim=dim, **composition)


class DifferentialCore(Core):
    """See the module's docstring.

    Args:
        head_dim: D.
        layer: l.
        qk_norm, dual_lambda: see `differential_attention`.
    """

    masks = True
    ignores_grid = True

    def __init__(self, head_dim: int, layer: int, *, qk_norm: bool = False, dual_lambda: bool = False) -> None:
        super().__init__()
        half = head_dim // 2
        self.scale, self.start = half**-0.5, 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.q_norm, self.k_norm = (nn.RMSNorm(half, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))
        shape = (2, 1) if dual_lambda else (2, half)
        self.lambda_q = nn.Parameter(torch.zeros(shape) if dual_lambda else 0.1 * torch.randn(shape))
        self.lambda_k = None if dual_lambda else nn.Parameter(0.1 * torch.randn(shape))
        self.norm = nn.RMSNorm(head_dim, eps=1e-5)

    def runs(self, window: tuple[int, int] | None, gated: bool) -> Runs:
        """See `Core`."""
        return Runs("scaled_dot_product_attention", False, "two maps, each by PyTorch's own fused kernel")

    def difference(self) -> Tensor:
        """λ."""
        products = self.lambda_q.float() * (1.0 if self.lambda_k is None else self.lambda_k.float())
        first, second = products.sum(-1).exp()
        return first - second + self.start

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None
    ) -> Tensor:
        added = added_to_logits(q_BMND, None, mask)
        first, second = (
            F.scaled_dot_product_attention(q, k, v_BMSD, added, scale=self.scale)
            for q, k in self._halves(q_BMND, k_BMSD)
        )
        difference = first - self.difference().to(first.dtype) * second
        return self.finished(difference).to(v_BMSD.dtype)

    def finished(self, o_BMND: Tensor) -> Tensor:
        """The norm behind the weighted values."""
        return self.norm(o_BMND) * (1 - self.start)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid, mask: Tensor | None = None) -> Tensor:
        """The difference of the weights (B, M, N, S), before the norm."""
        added = added_to_logits(q_BMND, None, mask)
        logits = [q @ k.mT * self.scale for q, k in self._halves(q_BMND, k_BMSD)]
        first, second = ((one if added is None else one + added).softmax(-1) for one in logits)
        return first - self.difference() * second

    def _halves(self, q_BMND: Tensor, k_BMSD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of the two maps."""
        halves = zip(q_BMND.chunk(2, dim=-1), k_BMSD.chunk(2, dim=-1), strict=True)
        return [(self.q_norm(q), self.k_norm(k)) for q, k in halves]
