"""Centroids of clusters, unit vectors that follow the tokens nearest to them; and learned keys of every cluster.

Source: Routing Transformers, Roy et al., TACL 2021, arXiv:2003.05997, section 4.1 and algorithm 1.
Shapes: B = batch, M = heads, N = tokens, D = channels per head, C = clusters, T = tokens that a centroid takes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

COMMITMENT = 1e-4  # weight of the loss


class Centroids(nn.Module):
    """C unit vectors for each head.

    What a batch moves them by is kept, and added at the beginning of the next: inside one step they stand still, also
    where the forward pass is computed twice. Its running average stops there as that of a batch norm does, by
    `momentum` and `num_batches_tracked`.

    Args:
        num_heads, clusters, head_dim: M, C and D.
        decay: of the average over training steps.
        memory: shape (2, M, C, n, D) of n keys and values of every cluster; None for none.
    """

    averages = True  # see models.layers.block
    asks_others = True  # in training, see models.callbacks.bad_steps

    def __init__(
        self,
        num_heads: int,
        clusters: int,
        head_dim: int,
        decay: float = 0.999,
        memory: tuple[int, int, int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.memory = None if memory is None else nn.Parameter(torch.randn(memory))
        self.clusters, self.momentum = clusters, 1 - decay
        self.register_buffer("means", F.normalize(torch.randn(num_heads, clusters, head_dim), dim=-1))
        self.register_buffer("pending", torch.zeros(num_heads, clusters, head_dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, near: list[Tensor], count: int) -> tuple[list[Tensor], Tensor]:
        """Which `count` tokens each centroid takes, (B, M, C, T), and the loss that draws tokens to their centroid.

        Args:
            near: queries, or queries and keys, as unit vectors (B, M, N, D).
        """
        moves = self.training and self.momentum > 0
        if moves:
            self._move()
        means = self.means.float().clone()
        scores = [unit @ means.mT for unit in near]
        index = [score.topk(count, dim=2)[1].mT for score in scores]
        tokens_BMND, nearest_BMN = torch.cat(near, dim=2), torch.cat(scores, dim=2).argmax(-1)
        own = means.expand(tokens_BMND.shape[0], -1, -1, -1).gather(2, nearest_BMN[..., None].expand_as(tokens_BMND))
        if moves:
            self._collect(tokens_BMND.detach(), nearest_BMN)
        return index, COMMITMENT * F.mse_loss(tokens_BMND, own)

    @torch.no_grad()
    def _move(self) -> None:
        """What was collected; a centroid without a token stays."""
        found = self.pending.norm(dim=-1, keepdim=True) > 0
        moved = F.normalize(self.means.lerp(F.normalize(self.pending, dim=-1), self.momentum), dim=-1)
        self.means.copy_(torch.where(found, moved, self.means))

    @torch.no_grad()
    def _collect(self, tokens_BMND: Tensor, nearest_BMN: Tensor) -> None:
        """Sums of the tokens nearest to each centroid, over all processes."""
        zeros = tokens_BMND.new_zeros(len(tokens_BMND), *self.means.shape)
        sums = zeros.scatter_add(2, nearest_BMN[..., None].expand_as(tokens_BMND), tokens_BMND).sum(0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        self.pending.copy_(sums)
        self.num_batches_tracked += 1
