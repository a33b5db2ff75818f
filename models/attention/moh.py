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
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.attention import AttentionFactory, Grid, Mixed, Refused, Runs, Site
from models.attention.contract.heads import gated_heads
from models.attention.contract.options import check_flags, for_stage
from models.attention.gating import Gating
from models.attention.head_router import ROUTERS

BALANCES = ("loss", "bias")
Heads = int | float | Sequence[int | float]


class MoHAttention(Gating):
    """Any attention with gated heads.

    Args:
        site: the place in the backbone.
        core: factory of the attention whose heads are gated, any with `accepts.gates`.
        shared_heads: heads that are always active, a number or a fraction of all heads, or a list of these with one
            entry per stage; of a plain ViT or DiT one per block.
        routed_heads: heads that each token chooses among the others, likewise.
        router: "softmax" (the paper), "relu" or "l2"; see `models.attention.head_router`.
        balance: "loss" returns the load balance loss; "bias" balances without one, see `HeadRouter`.
        all_reduce: balance the tokens of all processes together; the authors balance those of each by itself.
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
        shared_heads: Heads = 0.375,
        routed_heads: Heads = 0.375,
        router: str = "softmax",
        balance: str = "loss",
        all_reduce: bool = False,
        backend: str = "auto",
    ) -> None:
        _check(router, balance, backend)
        check_flags("moh", all_reduce=all_reduce)
        counts = for_layer("shared_heads", shared_heads, site), for_layer("routed_heads", routed_heads, site)
        shared, routed = resolve_heads(site.num_heads, *counts)
        super().__init__(site, core, "moh", backend)
        made = ROUTERS[router]
        if made.reads_queries and not self.mixer.has_queries:
            inner = type(self.mixer).__name__
            raise Refused(
                f"router=l2 needs the queries of each token, which {inner} has not", "set attention.router=relu"
            )
        options = {"balance": balance, "all_reduce": all_reduce, "backend": backend}
        self.router = made(site.dim, site.num_heads, shared, routed, **options)

    def runs(self, gated: bool = False) -> Runs:
        """Of the gated attention; see `models.attention.Mixer`."""
        return self.mixer.runs(gated=True)

    def forward(
        self,
        x_BNC: Tensor,
        grid: Grid,
        gates_BNM: Tensor | None = None,
        stream_BNC: Tensor | None = None,
        carry: Any = None,
    ) -> Mixed:
        queries = self.mixer.queries(x_BNC) if self.router.reads_queries else None
        gates, balance = self.router(x_BNC, queries)
        if gates_BNM is not None:
            gates = gated_heads(gates_BNM, gates)
        mixed = self.mixer(x_BNC, grid, gates.to(x_BNC.dtype), **self.handed(stream_BNC, carry))
        if balance is None or not self.training:
            return mixed
        losses = {**mixed.losses, "load_balance": balance + mixed.losses.get("load_balance", 0.0)}
        return mixed._replace(losses=losses)


def active_heads(model: nn.Module) -> float | None:
    """The share of heads that a token uses, Σ (S + K) / Σ M over the layers with gated heads; None without any.

    With router="relu" it is the share that training aims at.
    """
    routers = [module.router for module in model.modules() if isinstance(module, MoHAttention)]
    if not routers:
        return None
    return sum(router.shared + router.routed for router in routers) / sum(router.num_heads for router in routers)


def balance_heads(model: nn.Module) -> None:
    """Moves the biases of balance="bias" by one step: after every optimizer step, in all processes.

    A run of ours does so (`models.callbacks.routing`); a training loop of your own has to.
    """
    for module in model.modules():
        if isinstance(module, MoHAttention):
            module.router.after_step()


def start_undecided(router: nn.Module) -> None:
    """Every active head gets weight 1: layers that weight heads start at 0, as does that which chooses all there are.

    A layer that has heads to choose from keeps its random start; ties would send every token to the same ones.
    """
    chooses = router.routed < router.experts
    for layer in (router.wg_0, router.wg_1, None if chooses else router.wg):
        if layer is not None:
            nn.init.zeros_(layer.weight)


def for_layer(name: str, value: Any, site: Site) -> Any:
    """An option that is one value, or a list with one per stage, or with one per block of a plain ViT or DiT."""
    listed = site.kind == "vit" and isinstance(value, Sequence) and not isinstance(value, str)
    if listed and len(value) == site.depth:
        return value[site.block]
    if listed and len(value) != 4:
        raise Refused(
            f"{name} has {len(value)} entries for {site.depth} blocks", f"give attention.{name} one entry per block"
        )
    return for_stage(name, value, site)


def _check(router: str, balance: str, backend: str) -> None:
    values.choice("moh", "router", router, ROUTERS, fix="set attention.router")
    values.choice("moh", "balance", balance, BALANCES, fix="set attention.balance")
    if router == "relu" and balance == "loss":
        raise UserError("moh: router=relu is balanced by a bias, got balance=loss; set attention.balance=bias")
    if backend == "triton" and router != "softmax":
        raise UserError(f"moh: router={router} has no Triton kernel, got backend=triton; set attention.backend=auto")


def resolve_heads(num_heads: int, shared: int | float, routed: int | float) -> tuple[int, int]:
    """Numbers of shared and of active routed heads, from numbers or fractions of `num_heads`.

    Raises:
        ValueError: a number is negative, or a fraction is not between 0 and 1.
        Refused: more heads than there are, none active, or some that no token can ever choose.
    """
    for name, value in (("shared_heads", shared), ("routed_heads", routed)):
        what = "a number of heads or a fraction between 0.0 and 1.0"
        check = values.fraction if isinstance(value, float) else partial(values.whole, at_least=0)
        check("moh", name, value, what=what, fix=f"set attention.{name}")
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
