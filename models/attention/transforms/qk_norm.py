"""Query-key normalisation: the norm of every head's queries and keys, so that logits cannot grow without bound.

Source: Scaling Vision Transformers to 22 Billion Parameters, Dehghani et al., ICML 2023, arXiv:2302.05442, section 2
(LayerNorm); Query-Key Normalization for Transformers, Henry et al., 2020, arXiv:2010.04245.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head.
"""

from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Site
from models.attention.contract.heads import head_channels
from models.layers.norm import NORMS


def qk_norm(site: Site, *, norm: str = "layernorm", eps: float = 1e-6) -> "QueryKeyNorm":
    """A norm over the D channels of each head, with weights that the heads share.

    Args:
        site: the place in the backbone.
        norm: "layernorm" or "rmsnorm".
        eps: of the norm.

    Raises:
        ValueError: another norm, or a negative eps.
    """
    values.choice("qk_norm", "norm", norm, NORMS, fix="set attention.transform.norm")
    values.number("qk_norm", "eps", eps, fix="set attention.transform.eps")
    return QueryKeyNorm(head_channels(site), norm, eps)


class QueryKeyNorm(nn.Module):
    """One norm for queries and one for keys."""

    def __init__(self, head_dim: int, norm: str, eps: float) -> None:
        super().__init__()
        self.q, self.k = (NORMS[norm](head_dim, eps=eps) for _ in range(2))

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(q_BMND).to(v_BMSD.dtype), self.k(k_BMSD).to(v_BMSD.dtype), v_BMSD
