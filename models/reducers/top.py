"""Sparse tokens: a linear score per token, and the tokens with the largest go on.

Kept tokens are multiplied by 1, with the gradient of sigmoid(score) (straight through), so that scores are learned.

Source: after SPA, Zhang et al., Context-Aware Token Selection and Packing for Enhanced Vision Transformer, 2024,
arXiv:2410.23608, whose gate is supervised by labels of tokens. Its code is not public, and without such labels its loss
is empty: a fixed share of the tokens and the gradient are a reading of ours.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, K = kept tokens, besides the prefix.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conf import values
from models.layers.grid import Grid
from models.layers.reduced import Reduced, Reducer


class Top(Reducer):
    """(B, N, C) → (B, prefix + K, C), in the order that they had.

    Args:
        dim: channels C.
        share: K over the tokens of the map, rounded up.
    """

    def __init__(self, dim: int, share: float) -> None:
        super().__init__()
        self.share = share
        self.score = nn.Linear(dim, 1)
        nn.init.trunc_normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, x_BNC: Tensor, grid: Grid, carry: object = None) -> Reduced:
        prefix, x = x_BNC[:, : grid.prefix], x_BNC[:, grid.prefix :]
        score_BN = self.score(x).squeeze(-1)
        kept_BK = score_BN.topk(math.ceil(self.share * grid.cells), dim=1).indices.sort(1).values
        share_BK = score_BN.gather(1, kept_BK).sigmoid()
        x_BKC = x.gather(1, kept_BK.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x_BKC = x_BKC * (1 + (share_BK - share_BK.detach())).unsqueeze(-1)
        return Reduced(torch.cat([prefix, x_BKC], dim=1), kept_BK, {})


def top(dim: int, grid: Grid, quarter: int, *, share: float = 0.5, at: Sequence[int] = (2,)) -> Top | None:
    """A reducer in front of the chosen quarters of the blocks.

    Args:
        dim: channels C.
        grid: of the place.
        quarter: the place, 1 to 3.
        share: of the tokens of the map that go on, above 0.
        at: the places that have one.

    Raises:
        ValueError: a share or a place that is none.
    """
    if not (values.is_number(share, 0, 1) and share > 0):
        values.refuse("top", "share", "above 0 and at most 1", share, "set reducer.share")
    listed = isinstance(at, Sequence) and not isinstance(at, str) and len(at) > 0
    if not listed or not {*at} <= {1, 2, 3}:
        values.refuse("top", "at", "a list of quarters from 1 to 3", at, "set reducer.at, e.g. [2]")
    return Top(dim, share) if quarter in at else None
