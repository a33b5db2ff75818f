"""Mixture-of-head attention: a router weights the heads of any attention for every token and leaves some of them out.

Source: MoH, Jin et al., ICML 2025, arXiv:2410.11842. The first S heads are shared, the other E are routed:
    r = softmax(x Wg) over E,  m = its K largest;   g = K r m / Σ r m,   s = S softmax(x W1),   a1, a2 = 2 softmax(x W0)
    gates = [a1 s, a2 g];  s alone without routed heads, g alone without shared ones;  y = Σ gate_h head_h Wo.
The factors K, S, 2 and the sum over the selected heads are in the authors' code, not in the paper's equation 5; with
them the active gates are 1 when the router is undecided. The load balance loss is E Σ P f, with P the mean of r and f
the mean of m over the tokens: K when balanced, at most E. The paper's equation 7 lacks the factor E.

Shapes: B = batch, N = tokens, C = channels, M = heads, E = routed heads, K = active routed heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import is_fused
from kernels.moh_attention import route_heads
from models.attention import AttentionFactory, Grid, Mixed, Refused, Runs, Site
from models.attention.multihead import MultiHead
from models.layers.precision import full_precision


class MoHAttention(nn.Module):
    """Any attention with gated heads.

    Args:
        site: the place in the backbone.
        core: factory of the attention whose heads are gated, any with `accepts.gates`.
        shared_heads: heads that are always active, a number or a fraction of all heads.
        routed_heads: heads that each token chooses among the others, a number or a fraction of all heads.
        backend: of the router: "auto", "triton" or "torch"; the gated attention has its own.

    1 is one head, 1.0 all of them. The defaults keep about three quarters of the heads active, half of those shared.
    Where fractions leave fewer than two heads to choose from, all heads are shared.

    In training mode the forward pass returns the loss "load_balance" when heads are routed; in evaluation none.

    Raises:
        Refused: the attention cannot be gated, or the numbers do not fit the heads.
    """

    def __init__(
        self,
        site: Site,
        *,
        core: AttentionFactory,
        shared_heads: int | float = 0.375,
        routed_heads: int | float = 0.375,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        shared, routed = resolve_heads(site.num_heads, shared_heads, routed_heads)
        self.mixer = core(site)
        self.accepts = self.mixer.accepts
        if not self.accepts.gates:
            raise Refused(
                f"moh cannot gate the heads of {type(self.mixer).__name__}",
                "choose another attention.core, e.g. softmax",
            )
        if getattr(self.mixer, "reads_stream", False):
            raise Refused("moh gives the attention no input of the block", "set attention.core.residual_input=normed")
        if isinstance(self.mixer, MultiHead):
            self.mixer.gated = True
        self.backend = backend
        self.router = HeadRouter(site.dim, site.num_heads, shared, routed, backend)

    def runs(self) -> Runs:
        """Of the gated attention; see `models.attention.Runs`."""
        return self.mixer.runs()

    def forward(self, x_BNC: Tensor, grid: Grid, gates_BNM: Tensor | None = None) -> Mixed:
        gates, balance = self.router(x_BNC)
        if gates_BNM is not None:
            gates = gates * gates_BNM
        mixed = self.mixer(x_BNC, grid, gates.to(x_BNC.dtype))
        if balance is None or not self.training:
            return mixed
        return Mixed(mixed.x, {**mixed.losses, "load_balance": balance + mixed.losses.get("load_balance", 0.0)})

    def attention_matrix(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Of the gated attention, before the gates."""
        return self.mixer.attention_matrix(x_BNC, grid)


class HeadRouter(nn.Module):
    """Gates (B, N, M) of all heads, and the load balance loss (None without routed heads), in float32.

    Args:
        dim: channels C.
        num_heads: M.
        shared: S, heads that are always active; they come first.
        routed: K, heads chosen among the other M - S.
        backend: "auto", "triton" or "torch".
    """

    def __init__(self, dim: int, num_heads: int, shared: int, routed: int, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.num_heads, self.shared, self.routed = num_heads, shared, routed
        self.wg = nn.Linear(dim, num_heads - shared, bias=False) if routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False) if routed and shared else None
        self.wg_1 = nn.Linear(dim, shared, bias=False) if shared > 1 else None

    def forward(self, x_BNC: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x_BNC.float()
        layers = [layer for layer in (self.wg, self.wg_0, self.wg_1) if layer is not None]
        if layers and is_fused("route_heads", self.backend, x):
            with full_precision(x.device):
                logits_BNL = F.linear(x, torch.cat([layer.weight.float() for layer in layers]))
                return route_heads(logits_BNL, self.shared, self.routed, backend=self.backend)
        shared_BNS = x.new_ones(*x.shape[:2], self.shared)
        if self.wg_1 is not None:
            shared_BNS = self.shared * _probabilities(self.wg_1, x)
        if not self.routed:
            return shared_BNS, None
        scores_BNE = _probabilities(self.wg, x)
        mask_BNE = largest(scores_BNE, self.routed)
        chosen = scores_BNE * mask_BNE
        routed_BNE = self.routed * chosen / chosen.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)
        experts = self.num_heads - self.shared
        balance = experts * (scores_BNE.mean((0, 1)) * mask_BNE.mean((0, 1))).sum()
        if not self.shared:
            return routed_BNE, balance
        alpha_1, alpha_2 = (2 * _probabilities(self.wg_0, x)).split(1, dim=-1)
        return torch.cat([alpha_1 * shared_BNS, alpha_2 * routed_BNE], dim=-1), balance


def largest(scores_BNE: Tensor, count: int) -> Tensor:
    """1 at the `count` largest scores of each token and 0 elsewhere; ties go to the lowest index.

    A stable sort, because the order of ties in torch.topk is unspecified and differs between devices.
    """
    order = scores_BNE.detach().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores_BNE).scatter(-1, order[..., :count], 1.0)


def resolve_heads(num_heads: int, shared: int | float, routed: int | float) -> tuple[int, int]:
    """Numbers of shared and of active routed heads, from numbers or fractions of `num_heads`.

    Raises:
        ValueError: a number is negative, or a fraction is not between 0 and 1.
        Refused: more heads than there are, none active, or some that no token can ever choose.
    """
    for name, value in (("shared_heads", shared), ("routed_heads", routed)):
        if value < 0 or (isinstance(value, float) and value > 1):
            raise ValueError(
                f"moh: {name} must be a number of heads or a fraction between 0.0 and 1.0, got {value}; change it"
            )
    fractions = isinstance(shared, float) and isinstance(routed, float)
    # halves go to the shared heads, so that 4 heads become 2 shared and 1 of 2 routed
    S = math.floor(shared * num_heads + 0.5) if isinstance(shared, float) else shared
    K = math.ceil(routed * num_heads - 0.5) if isinstance(routed, float) else routed
    if fractions and num_heads - S < 2:
        S, K = num_heads, 0
    if num_heads < S + K:
        raise Refused(
            f"moh: {S} shared and {K} routed heads are more than the {num_heads} heads",
            "lower attention.shared_heads or attention.routed_heads",
        )
    if K == 0 and num_heads > S:
        raise Refused(
            f"moh: {S} shared and 0 routed heads leave {num_heads - S} of {num_heads} heads unused",
            "raise attention.routed_heads, or share all heads",
        )
    return S, K


def _probabilities(linear: nn.Linear, x_BNC: Tensor) -> Tensor:
    """softmax of the logits in float32 also under autocast: half precision would choose other heads."""
    with full_precision(x_BNC.device):
        return F.linear(x_BNC, linear.weight.float()).softmax(-1)
