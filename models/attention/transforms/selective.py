"""Selective attention: every query and value has a temperature of its own.

Source: Selective Attention: Enhancing Transformer through Principled Context Control, Zhang et al., NeurIPS 2024,
arXiv:2411.12892, equation 4: q ← τ(q) q, v ← τ(v) v, with τ = 1 + tanh(f) of the token and, for queries, more by place:
    position:  1 + exp(−exp(β)) ln i  for the i-th token.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head.
The public code has the part by place alone, for causal language models; in raster order it means little, so it is off.
f is a network D → D / 4 → 1 that all heads share, read here from the query or value itself.
"""

import torch
from torch import Tensor, nn

from conf import values
from conf.errors import UserError
from models.attention.contract import Grid, Site
from models.attention.contract.heads import head_channels

WHO = "selective"


def selective(site: Site, *, token: bool = True, position: bool = False) -> "Selective":
    """Temperatures of queries and values.

    Args:
        site: the place in the backbone.
        token: by what the token holds, of queries and values.
        position: by its place in raster order, prefix tokens first, of queries: the public code.

    Raises:
        ValueError: neither of the two.
    """
    for name, value in (("token", token), ("position", position)):
        values.flag(WHO, name, value, fix=f"set attention.transform.{name}=true or false")
    if not token and not position:
        raise UserError(f"{WHO}: token and position must not both be false; set attention.transform.token=true")
    return Selective(head_channels(site), token, position)


class Selective(nn.Module):
    """Near 1 at the start, apart from β = 2."""

    def __init__(self, head_dim: int, token: bool, position: bool) -> None:
        super().__init__()
        self.q, self.v = (_temperature(head_dim) if token else None for _ in range(2))
        self.beta = nn.Parameter(torch.tensor(2.0)) if position else None

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        factor: Tensor | float = 1.0
        if self.q is not None:
            factor, v_BMSD = 1 + self.q(q_BMND).tanh(), v_BMSD * (1 + self.v(v_BMSD).tanh()).to(v_BMSD.dtype)
        if self.beta is not None:
            place_N1 = torch.arange(1, q_BMND.shape[2] + 1, device=q_BMND.device)[:, None]
            factor = factor + torch.exp(-torch.exp(self.beta)) * place_N1.log()
        return q_BMND * factor.to(q_BMND.dtype), k_BMSD, v_BMSD


def _temperature(dim: int) -> nn.Sequential:
    layers = nn.Linear(dim, max(dim // 4, 1)), nn.GELU(), nn.Linear(max(dim // 4, 1), 1)
    nn.init.normal_(layers[-1].weight, std=0.02)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)
