"""Primer's depth-wise convolutions of queries, keys and values behind the projection.

Source: Primer: Searching for Efficient Transformers for Language Modeling, So et al., NeurIPS 2021, arXiv:2109.08668,
section 3 (multi-DConv-head attention); there of length 3 on words, here 3×3 on the map.
Shapes: B = batch, M = heads, N = queries, S = keys, D = channels per head, C = M·D.
Every channel has weights of its own. Prefix tokens are left as they are. The paper's squared ReLU is
`model.activation=relu2`.
"""

import torch
from torch import Tensor, nn

from conf import values
from kernels.heads import heads_to_map, map_to_heads
from models.attention.contract import Grid, Site
from models.attention.contract.heads import head_channels

STARTS = ("primer", "delta")


def primer(site: Site, *, init: str = "primer") -> "Primer":
    """Three convolutions of 9·C weights.

    Args:
        site: the place in the backbone.
        init: "primer", 0.5 in the middle and 0.5 / 9 around it; "delta", 1 in the middle: nothing changes at first.

    Raises:
        ValueError: another start.
    """
    values.choice("primer", "init", init, STARTS, fix="set attention.transform.init")
    return Primer(site.num_heads * head_channels(site), init)


class Primer(nn.Module):
    """One convolution each for queries, keys and values."""

    def __init__(self, dim: int, init: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False) for _ in range(3))
        for conv in (self.q, self.k, self.v):
            nn.init.constant_(conv.weight, 0.0 if init == "delta" else 0.5 / 9)
            nn.init.constant_(conv.weight[:, :, 1, 1], 1.0 if init == "delta" else 0.5)

    def forward(
        self, q_BMND: Tensor, k_BMSD: Tensor, v_BMSD: Tensor, grid: Grid, kv_grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = _convolved(self.q, q_BMND, grid)
        return q, _convolved(self.k, k_BMSD, kv_grid), _convolved(self.v, v_BMSD, kv_grid)


def _convolved(conv: nn.Conv2d, x_BMND: Tensor, grid: Grid) -> Tensor:
    y = map_to_heads(conv(heads_to_map(x_BMND, grid)), x_BMND.shape[1])
    return y if not grid.prefix else torch.cat([x_BMND[:, :, : grid.prefix].to(y.dtype), y], dim=2)
