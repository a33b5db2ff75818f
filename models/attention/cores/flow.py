"""Flow attention: values flow from sources to sinks, each with a capacity, which makes them compete for it.

Source: Flowformer: Linearizing Transformers with Conservation Flows, Wu et al., ICML 2022, arXiv:2202.06258, section 3.
With φ = sigmoid, I what flows into a query (sink) and O what flows out of a key (source):
    I_i = φ(q_i) · Σ φ(k),           O_j = φ(k_j) · Σ φ(q)
    Î_i = φ(q_i) · Σ φ(k_j) / O_j,   Ô_j = φ(k_j) · Σ φ(q_i) / I_i
    o_i = σ(Î_i N / S) (φ(q_i) / I_i) Σ_j φ(k_j)ᵀ softmax_j(Ô)_j S v_j
Shapes: B = batch, N = queries, S = keys, M = heads, D = channels per head.
Beyond the paper, as in the authors' code: ε = 1e-6 is added to every channel in all products, Ô is clamped to ±1, and
their code for images adds another ε to each product (`outer_eps`), that of the root of their repository does not.
"""

from typing import Unpack

from torch import Tensor

from kernels.precision import full_precision, wide
from models.attention.assemble import Composition, assemble
from models.attention.contract import Grid, Mixer, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.options import check_flags, check_whole
from models.attention.multihead import Core

EPS = 1e-6


def flow_attention(
    site: Site, *, outer_eps: bool = True, head_dim: int | None = None, **composition: Unpack[Composition]
) -> Mixer:
    """Linear attention with competing sources and allocated sinks.

    Args:
        site: the place in the backbone.
        outer_eps: add 1e-6 to every sum of flows too, as the authors' code for images does.
        head_dim: channels per head D; C / M by default.
        composition: layout, other parts, projection and backend, see `models.attention.assemble.Composition`.
    """
    check_flags("flow", outer_eps=outer_eps)
    check_whole("flow", head_dim=1 if head_dim is None else head_dim)
    dim = head_dim or head_channels(site)
    return assemble(site, lambda *_: FlowCore(outer_eps), head_dim=dim, **composition)


class FlowCore(Core):
    """No parameters; in float32 at least."""

    ignores_grid = True

    def __init__(self, outer_eps: bool = True) -> None:
        super().__init__()
        self.outer = EPS if outer_eps else 0.0

    def forward(self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        with full_precision(q_BMND.device):
            q, k, competing, allocated = self._flows(q_BMND, k_BMSD)
            o_BMND = q @ (k.mT @ (wide(v_BMSD) * competing)) * allocated
        return o_BMND.to(v_BMSD.dtype)

    def matrix(self, q_BMND: Tensor, k_BMSD: Tensor, grid: Grid, kv_grid: Grid) -> Tensor:
        """The weights (B, M, N, S), positive; rows do not sum to one: quadratic, for looking at and for tests."""
        with full_precision(q_BMND.device):
            q, k, competing, allocated = self._flows(q_BMND, k_BMSD)
            return q @ k.mT * competing.mT * allocated

    def _flows(self, q_BMND: Tensor, k_BMSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """φ(q) / I, φ(k), and what competition and allocation give: (B, M, S, 1) and (B, M, N, 1)."""
        q, k = wide(q_BMND).sigmoid(), wide(k_BMSD).sigmoid()
        N, S = q.shape[2], k.shape[2]
        incoming, outgoing = self._sum(q, k), self._sum(k, q)
        conserved_in, conserved_out = self._sum(q, k / outgoing), self._sum(k, q / incoming).clamp(-1, 1)
        return q / incoming, k, conserved_out.softmax(2) * S, (conserved_in * N / S).sigmoid()

    def _sum(self, x_BMND: Tensor, y_BMSD: Tensor) -> Tensor:
        """(B, M, N, 1): every x with the sum of all y."""
        return (x_BMND + EPS) @ (y_BMSD.sum(2, keepdim=True) + EPS).mT + self.outer
