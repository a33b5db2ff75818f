"""Routers of mixture-of-head attention: which heads a token uses, and how much of each.

Three kinds; `softmax` is the published one.
    softmax: MoH, Jin et al., ICML 2025, arXiv:2410.11842; see `models.attention.moh`.
    relu:    r = relu(x Wg + b), g = K r / Σ r: any number of heads is active, none where all are below 0. b has no
             gradient: it holds the load of every head at K / E, as in balancing without a loss. Routing by ReLU is
             ReMoE's, Wang et al., ICLR 2025, arXiv:2412.14711, which holds the number by a loss instead.
    l2:      no parameters: r = softmax(‖q‖ / σ) with σ the deviation of the norms over the routed heads; shared heads
             and the K largest have gate 1, with a straight-through gradient (none through σ). So MoH-LLaMA3 routes.

Shapes: B = batch, N = tokens, C = channels, M = heads, E = routed heads, S = shared heads, K = active routed heads,
L = logits.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.moh_attention import joined, largest, route_heads
from kernels.precision import full_precision
from models.layers.processes import all_reduce

# of the bias of loss-free balancing, per step: Wang et al. 2024, arXiv:2408.15664
BIAS_RATE = 1e-3


class Seen(NamedTuple):
    """What a router did with the tokens that it saw while it was watched, of all processes."""

    load: list[float]  # of each routed head: the share of the tokens that used it
    entropy: float  # of the scores, in units of log E: 1 for an undecided router, 0 for a certain one
    margin: float  # between the K-th and the next logit: where it is tiny, rounding chooses; 0 when all are chosen


class HeadRouter(nn.Module):
    """Gates (B, N, M) of all heads, and the load balance loss (None without one), in float32.

    Args:
        dim: channels C.
        num_heads: M.
        shared: S, heads that are always active; they come first.
        routed: K, heads chosen among the other E = M - S.
        balance: "loss", as published, or "bias": no loss; a bias that is added to the scores only where heads are
            chosen, and that `after_step` moves towards heads with less than their share.
        all_reduce: the loss is that of the tokens of all processes together, instead of its mean over processes.
        backend: "auto", "triton" or "torch".

    `watch` begins to collect statistics, `seen` ends it and gives them.
    """

    reads_queries = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared: int,
        routed: int,
        *,
        balance: str = "loss",
        all_reduce: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend, self.all_reduce = backend, all_reduce
        self.asks_others = all_reduce  # see models.callbacks.bad_steps
        self.num_heads, self.shared, self.routed, self.experts = num_heads, shared, routed, num_heads - shared
        self.watched, self._sums = False, None
        self._add_layers(dim)
        biased = routed > 0 and balance == "bias"
        self.register_buffer("bias", torch.zeros(self.experts) if biased else None)
        # what training adds up between two optimizer steps: uses of each routed head, and tokens; with activation
        # checkpointing both twice, which changes no share
        self.register_buffer("load", torch.zeros(self.experts + 1) if biased else None, persistent=False)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Counting begins anew, also in a model that was made on the meta device."""
        super()._load_from_state_dict(*args)
        self.load = None if self.load is None else self.bias.new_zeros(self.experts + 1)

    def _add_layers(self, dim: int) -> None:
        self.wg = nn.Linear(dim, self.experts, bias=False) if self.routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False) if self.routed and self.shared else None
        self.wg_1 = nn.Linear(dim, self.shared, bias=False) if self.shared > 1 else None

    def forward(self, x_BNC: Tensor, queries_BMND: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits_BNL = self._logits(x_BNC)
        wg_BNE = logits_BNL[..., : self.experts if self.routed else 0]
        if self.bias is not None:
            chosen = largest(wg_BNE.softmax(-1) + self.bias, self.routed) > 0
            others = logits_BNL[..., self.experts :]
            logits_BNL = torch.cat([wg_BNE.masked_fill(~chosen, -torch.inf), others], dim=-1)
        gates, balance = route_heads(logits_BNL, self.shared, self.routed, backend=self.backend)
        if not self.routed:
            return gates, None
        if self.bias is not None:
            self._note(wg_BNE, chosen)
            return gates, None
        if self.watched or self.all_reduce:
            scores = wg_BNE.softmax(-1)
            mask = largest(scores, self.routed)
            self._note(wg_BNE, mask > 0)
            balance = self._balance(scores, mask) if self.all_reduce and self.training else balance
        return gates, balance

    def _logits(self, x_BNC: Tensor) -> Tensor:
        """(B, N, L) in float32 also under autocast: half precision would choose other heads."""
        layers = [layer for layer in (self.wg, self.wg_0, self.wg_1) if layer is not None]
        x = x_BNC.float()
        if not layers:
            return x.new_empty(*x.shape[:2], 0)
        with full_precision(x.device):
            return F.linear(x, torch.cat([layer.weight.float() for layer in layers]))

    def _balance(self, scores_BNE: Tensor, mask_BNE: Tensor) -> Tensor:
        """E Σ P f."""
        return self.experts * (self._mean(scores_BNE) * self._mean(mask_BNE.to(scores_BNE.dtype))).sum()

    def _mean(self, value_BNE: Tensor) -> Tensor:
        """Over the tokens, in training those of all processes if that was asked for: they all take part there."""
        mean, everywhere = value_BNE.mean((0, 1)), self.all_reduce and self.training and dist.is_initialized()
        return all_reduce(mean) / dist.get_world_size() if everywhere else mean

    @torch.no_grad()
    def _note(self, logits_BNE: Tensor, mask_BNE: Tensor) -> None:
        """Counts what the balancing needs, and the statistics while they are watched."""
        if self.load is not None and self.training:
            uses = mask_BNE.sum((0, 1), dtype=self.load.dtype)
            self.load += torch.cat([uses, uses.new_full((1,), mask_BNE[..., 0].numel())])
        if self.watched:
            sums = _sums(logits_BNE, mask_BNE, self.routed)
            self._sums = sums if self._sums is None else self._sums + sums

    def watch(self) -> None:
        """Collects statistics from now on."""
        self.watched, self._sums = True, None

    def seen(self) -> Seen | None:
        """What has been collected since `watch`; None without tokens or routed heads. To be called in all processes."""
        sums, self._sums, self.watched = self._sums, None, False
        if sums is None:
            return None
        if dist.is_initialized():
            dist.all_reduce(sums)
        *load, entropy, margin, tokens = sums.tolist()
        return Seen([uses / tokens for uses in load], entropy / tokens, margin / tokens)

    @torch.no_grad()
    def after_step(self) -> None:
        """Balancing without a loss. To be called after every optimizer step, in all processes."""
        if self.load is None or not self.training:  # frozen: nothing was counted
            return
        if dist.is_initialized():
            dist.all_reduce(self.load)
        self._adapt(self.load[:-1], self.load[-1])
        self.load.zero_()

    def _adapt(self, uses_E: Tensor, tokens: Tensor) -> None:
        self.bias += BIAS_RATE * (uses_E.mean() - uses_E).sign()


class ReLURouter(HeadRouter):
    """Any number of heads per token, K in the mean; `balance` must be "bias"."""

    def forward(self, x_BNC: Tensor, queries_BMND: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits_BNL, E = self._logits(x_BNC), self.experts
        if not self.routed:
            return route_heads(logits_BNL, self.shared, 0, backend=self.backend)
        wg, w0, w1 = logits_BNL[..., :E] + self.bias, logits_BNL[..., E : E + 2], logits_BNL[..., E + 2 :]
        scores = wg.relu()
        self._note(wg, scores.detach() > 0)
        gates = self.routed * scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        return joined(gates, w0, w1, self.shared), None

    def _adapt(self, uses_E: Tensor, tokens: Tensor) -> None:
        self.bias += BIAS_RATE * (self.routed / self.experts - uses_E / tokens).sign()


class QueryRouter(HeadRouter):
    """Chooses the routed heads with the longest queries; no parameters. The gradient passes it in training only."""

    reads_queries = True

    def _add_layers(self, dim: int) -> None:
        self.wg = self.wg_0 = self.wg_1 = None

    def forward(self, x_BNC: Tensor, queries_BMND: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        ones_BNS = x_BNC.new_ones(*x_BNC.shape[:2], self.shared, dtype=torch.float32)
        if not self.routed:
            return ones_BNS, None
        norms_BNE = queries_BMND[:, self.shared :].float().norm(dim=-1).transpose(1, 2)
        logits = _standardised(norms_BNE) if self.experts > 1 else norms_BNE
        scores = logits.softmax(-1)
        mask = largest(scores if self.bias is None else scores + self.bias, self.routed)
        self._note(logits, mask > 0)
        routed = mask * (1 + scores - scores.detach()) if self.training else mask
        gates = torch.cat([ones_BNS, routed], dim=-1)
        return gates, None if self.bias is not None else self._balance(scores, mask)


def _standardised(norms_BNE: Tensor) -> Tensor:
    """Differences from the mean over σ. Where norms (nearly) agree σ says nothing: it is at least 0.1 % of the mean."""
    mean, deviation = (statistic(norms_BNE.detach(), -1, keepdim=True) for statistic in (torch.mean, torch.std))
    return (norms_BNE - mean) / deviation.maximum(1e-3 * mean).clamp_min(torch.finfo(torch.float32).tiny)


ROUTERS = {"softmax": HeadRouter, "relu": ReLURouter, "l2": QueryRouter}


def _sums(logits_BNE: Tensor, mask_BNE: Tensor, routed: int) -> Tensor:
    """(E + 3): uses of each head, entropy, margin and number of the tokens."""
    E, scores = logits_BNE.shape[-1], logits_BNE.softmax(-1)
    entropy = torch.special.entr(scores).sum(-1) / math.log(max(E, 2))
    best = logits_BNE.sort(dim=-1, descending=True).values
    margin = best[..., routed - 1] - best[..., routed] if routed < E else torch.zeros_like(entropy)
    sums = torch.stack([entropy, margin, torch.ones_like(margin)], dim=-1)
    return torch.cat([mask_BNE.to(sums.dtype), sums], dim=-1).sum((0, 1), dtype=torch.float64)
