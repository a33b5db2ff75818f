"""ACMIL: several branches of gated attention, kept different from each other, whose mean map pools the tokens.

Branch q: A_q = softmax(w_q (tanh(V x) ∘ sigmoid(U x))) over the tokens, and a classifier of its own on A_q x, which
training teaches by the label (`Pooled.logits`, loss `branches`). The features are those of the mean of all A_q. The
loss `diversity` is the mean cosine of two A_q. In training some of the tokens that a branch weights most are closed.

Source: Zhang et al., Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification, ECCV 2024,
arXiv:2311.07125. The authors' code takes one bag of instances at a time, here a batch of maps.
Shapes: B = batch, N = prefix + H·W tokens, C = channels, Q = branches, S = H·W, I = inner channels, K = classes.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from models.layers.grid import Grid
from models.layers.pooled import Pool, Pooled

WHO = "ACMIL"


class ACMIL(Pool):
    """(B, N, C) → (B, I); class tokens are left out.

    Args:
        dim: channels C.
        grid: of the place; it does not depend on it.
        num_classes: K; 0 for no classifiers of the branches.
        branches: Q.
        hidden: channels of the gated attention.
        inner: I, of a first Linear with ReLU; None for C and neither of the two.
        masked: of how many tokens with the largest weights of a branch training closes some; 0 for none.
        mask_share: the share of these that are closed, below 1.

    Raises:
        ValueError: an option out of range.
    """

    learns_from_labels = True

    def __init__(
        self,
        dim: int,
        grid: Grid,
        num_classes: int,
        *,
        branches: int = 5,
        hidden: int = 128,
        inner: int | None = None,
        masked: int = 10,
        mask_share: float = 0.6,
    ) -> None:
        for name, value in (("branches", branches), ("hidden", hidden), ("inner", dim if inner is None else inner)):
            values.whole(WHO, name, value, fix=f"set pool.{name}")
        values.whole(WHO, "masked", masked, 0, fix="set pool.masked")
        if not values.is_number(mask_share, 0, 1) or mask_share == 1:
            values.refuse(WHO, "mask_share", "at least 0 and below 1", mask_share, "set pool.mask_share")
        width = dim if inner is None else inner
        super().__init__(width)
        self.masked, self.mask_share = masked, mask_share
        self.reduce = None if inner is None else nn.Linear(dim, width, bias=False)
        self.content, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, branches)
        self.branches = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(branches if num_classes else 0))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Pooled:
        x_BSI = x_BNC[:, grid.prefix :]
        if self.reduce is not None:
            x_BSI = self.reduce(x_BSI).relu()
        logits_BQS = self.score(self.content(x_BSI).tanh() * self.gate(x_BSI).sigmoid()).mT
        if self.training and self.masked:
            logits_BQS = logits_BQS.masked_fill(self._closed(logits_BQS), torch.finfo(logits_BQS.dtype).min)
        weights_BQS = logits_BQS.softmax(-1)
        x_BI = (weights_BQS.mean(1, keepdim=True) @ x_BSI).squeeze(1)
        return Pooled(x_BI, weights_BQS, _diversity(weights_BQS), self._of_branches(weights_BQS @ x_BSI))

    def _closed(self, logits_BQS: Tensor) -> Tensor:
        """Which tokens a branch does not see: a random share of those with its largest weights."""
        top_BQT = logits_BQS.topk(min(self.masked, logits_BQS.shape[-1]), dim=-1).indices
        count = int(top_BQT.shape[-1] * self.mask_share)
        order_BQT = torch.rand(top_BQT.shape, device=top_BQT.device).argsort(-1)
        closed = top_BQT.gather(-1, order_BQT[..., :count])
        return torch.zeros_like(logits_BQS, dtype=torch.bool).scatter(-1, closed, True)

    def _of_branches(self, pooled_BQI: Tensor) -> Tensor | None:
        """(B, Q, K), each branch judged by its own classifier."""
        if not self.branches:
            return None
        return torch.stack([layer(x) for layer, x in zip(self.branches, pooled_BQI.unbind(1), strict=True)], dim=1)


def _diversity(weights_BQS: Tensor) -> dict[str, Tensor]:
    """The mean cosine of the maps of two branches; nothing of a single one."""
    pairs = list(combinations(weights_BQS.unbind(1), 2))
    if not pairs:
        return {}
    return {"diversity": torch.stack([F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).mean()}
