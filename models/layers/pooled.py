"""What a pool is and gives: the tokens of the last stage become what the classifier is given.

Shapes: B = batch, N = prefix + H·W tokens, C = channels, Q = queries, S = tokens that are pooled, K = classes.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Pooled(NamedTuple):
    """What a pool returns.

    Attributes:
        x: features (B, C'); (B, K, C') of a pool with a query for each class, which brings the head for them.
        weights: (B, Q, S), how much every query takes of every token; the last H·W of these are the map. None where
            that is no question, as for the mean.
        losses: scalar auxiliary losses with gradient, by name.
        logits: (B, Q, K) of classifiers of the queries' own that are trained beside the head, where there are some.
    """

    x: Tensor
    weights: Tensor | None
    losses: dict[str, Tensor]
    logits: Tensor | None = None

    def losses_with(self, labels: Tensor | None) -> dict[str, Tensor]:
        """The losses; where there are `logits` and labels (B,) or (B, K), `branches` too: their mean cross entropy."""
        if self.logits is None or labels is None:
            return self.losses
        of_queries = labels.repeat_interleave(self.logits.shape[1], 0)
        return self.losses | {"branches": F.cross_entropy(self.logits.flatten(0, 1).float(), of_queries)}


class Pool(nn.Module):
    """Called as `pool(x_BNC, grid) -> Pooled`, for any map; a factory of one is `pool(dim, grid, num_classes)`.

    Attributes:
        out_dim: C', which the head is made for.
        undecayed: names of its parameters without weight decay, such as queries.
        learns_from_labels: whether `Pooled.logits` are to be trained.
        has_weights: whether it gives `Pooled.weights`.
        reads_map: whether it reads the tokens of the map, or those in front of it alone.
        normalizes: whether it normalises the tokens and its features itself.
    """

    undecayed: tuple[str, ...] = ()
    learns_from_labels = False
    has_weights = True
    reads_map = True
    normalizes = False

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim

    def own_head(self, num_classes: int) -> nn.Module | None:
        """The classifier that alone goes with what it gives; None where any does."""
        return None
