"""Gated attention: the heads of any attention are weighted before its projection, by what their token holds.

Source: Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing, Bondarenko et al., NeurIPS
2023, arXiv:2306.12929, equation 5: head h ← σ(G_h(x_h)) head h, with x_h the h-th slice of the channels of x, the input
of the layer; per channel of a head: Gated Attention for Large Language Models, Qiu et al., NeurIPS 2025,
arXiv:2505.06708, as in timm's `Attention(gated=True)`.
Shapes: B = batch, N = tokens, C = channels, M = heads, D = channels per head, K = hidden channels of a head.
A head's gate of `kind=head` is the sigmoid of the mean of its tokens' logits. The authors set the bias from `init` in
the linear case alone; here it is always set. For trained weights they multiply by 1 / `init`, which is `scale`.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.attention import AttentionFactory, Grid, Mixed, Refused, Runs, Site
from models.attention.contract.heads import gated_heads, head_channels
from models.attention.gating import Gating

KINDS = ("token", "head", "constant", "elementwise")
WHO = "gated"


class GatedAttention(Gating):
    """Any attention whose heads are gated.

    Args:
        site: the place in the backbone.
        core: factory of the attention whose heads are gated, any with `accepts.gates`.
        kind: "token", a gate per token and head; "head", one per head and image; "constant", a learned one per head;
            "elementwise", one per token and channel of a head.
        hidden: gates by a hidden layer with the channels of a head divided by this (4 or 1 in the paper); None for a
            linear layer.
        shared: a layer that reads all channels instead of one per head; "elementwise" always does.
        init: gates at the start, about; between 0 and 1.
        scale: multiplies the gates.
        backend: which the attention has too: "auto", "triton" or "torch".

    Raises:
        Refused: the attention cannot be gated.
        ValueError: options that are wrong, or exclude each other.
    """

    def __init__(
        self,
        site: Site,
        *,
        core: AttentionFactory,
        kind: str = "token",
        hidden: int | None = None,
        shared: bool = False,
        init: float = 0.5,
        scale: float = 1.0,
        backend: str = "auto",
    ) -> None:
        _check(kind, hidden, shared, init, scale)
        super().__init__(site, core, WHO, backend)
        self.kind, self.scale, self.has_queries = kind, scale, self.mixer.has_queries
        width = site.num_heads * (getattr(self.mixer, "head_dim", None) or head_channels(site))
        self.gate = _gate(site, kind, hidden, shared, init, width)

    def runs(self, gated: bool = False) -> Runs:
        """Of the gated attention; see `models.attention.Mixer`."""
        return self.mixer.runs(gated=gated or self.kind != "elementwise")

    def gates(self, x_BNC: Tensor) -> Tensor:
        """(B, N, M), or (B, N, M·D) of `kind=elementwise`."""
        if self.kind == "constant":
            return (self.scale * self.gate.sigmoid()).expand(*x_BNC.shape[:2], -1)
        logits = self.gate(x_BNC)
        if self.kind == "head":
            logits = logits.mean(1, keepdim=True).expand_as(logits)
        return self.scale * logits.sigmoid()

    def forward(
        self,
        x_BNC: Tensor,
        grid: Grid,
        gates_BNM: Tensor | None = None,
        stream_BNC: Tensor | None = None,
        carry: Any = None,
    ) -> Mixed:
        gates = self.gates(x_BNC)
        if gates_BNM is not None:
            wide, narrow = sorted((gates, gates_BNM), key=lambda gates: -gates.shape[-1])
            gates = gated_heads(wide, narrow)
        return self.mixer(x_BNC, grid, gates.to(x_BNC.dtype), **self.handed(stream_BNC, carry))

    def queries(self, x_BNC: Tensor) -> Tensor:
        """Of the gated attention; see `models.attention.Mixer`."""
        return self.mixer.queries(x_BNC)


class HeadGates(nn.Module):
    """Logits (B, N, M): a network of each head on its slice of the channels."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        sizes = (dim, num_heads) if not hidden else (dim, num_heads * hidden, num_heads)
        pairs = itertools.pairwise(sizes)
        layers = [nn.Conv1d(here, there, 1, groups=num_heads) for here, there in pairs]
        self.layers = nn.Sequential(*(layers if not hidden else (layers[0], nn.ReLU(), layers[1])))

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.layers(x_BNC.mT).mT


def _gate(site: Site, kind: str, hidden: int | None, shared: bool, init: float, width: int) -> nn.Module | nn.Parameter:
    """What gives the logits of the gates."""
    start = math.log(init / (1 - init))
    if kind == "constant":
        return nn.Parameter(torch.full((site.num_heads,), start))
    if shared or kind == "elementwise":
        gate = last = nn.Linear(site.dim, width if kind == "elementwise" else site.num_heads)
    else:
        if site.dim % site.num_heads:
            raise Refused(
                f"gated: {site.dim} channels of the input do not divide into slices for {site.num_heads} heads",
                "set attention.shared=true",
            )
        slice_dim = site.dim // site.num_heads
        gate = HeadGates(site.dim, site.num_heads, max(slice_dim // hidden, 1) if hidden else 0)
        last = gate.layers[-1]
    nn.init.constant_(last.bias, start)
    return gate


def _check(kind: str, hidden: int | None, shared: bool, init: float, scale: float) -> None:
    values.choice(WHO, "kind", kind, KINDS, fix="set attention.kind")
    values.whole(WHO, "hidden", 1 if hidden is None else hidden, fix="set attention.hidden, or null for none")
    values.flag(WHO, "shared", shared, fix="set attention.shared=true or false")
    if not values.is_number(init, 0, 1) or init in (0, 1):
        values.refuse(WHO, "init", "a number between 0 and 1, both excluded", init, "set attention.init, e.g. 0.5")
    if not values.is_number(scale) or scale <= 0:
        values.refuse(WHO, "scale", "a number above 0", scale, "set attention.scale, e.g. 1")
    if hidden is not None and (shared or kind in ("constant", "elementwise")):
        raise UserError(f"{WHO}: a hidden layer is one of each head, got hidden={hidden}; set attention.hidden=null")
