"""Clusters around learned centroids: each takes the queries and the keys that are most like it.

Source: Efficient Content-Based Sparse Attention with Routing Transformers, Roy et al., TACL 2021, arXiv:2003.05997,
section 4, as in the code of lucidrains (routing-transformer). For every head there are C unit vectors μ; with w tokens
in a cluster, unit q̂ and k̂,
    the queries and keys of cluster c are the w with the largest q̂ μ_c and the w with the largest k̂ μ_c,
softmax attention inside, and the mean of a token's clusters; what is in none gets zero. In training μ follows the sums
of the tokens that are nearest to it, and `losses["commitment"]` draws tokens to theirs. Here half of the heads see
consecutive tokens by default, as in the paper, so that no token is left out; centroids stay unit vectors, and start as
random ones instead of by k-means of the first batch; they move with the next batch, so that a recomputed forward pass
finds them as they were.
Shapes: B = batch, M = heads, N = H·W tokens, D = channels per head; C = clusters, T = w tokens of one, S = its keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from models.attention.contract import Grid, Site
from models.attention.contract.heads import head_channels
from models.attention.contract.layout import SCATTERED, Groups, Layout
from models.attention.contract.options import check_flags
from models.attention.layouts.clusters.centroids import Centroids
from models.attention.layouts.clusters.gathering import in_groups

COVERS = ("local", "none")
ITSELF = -5e4  # what is added to the logit of a token with itself where queries are keys


def routing(
    site: Site,
    *,
    clusters: int = 8,
    members: int | None = None,
    cover: str = "local",
    shared_qk: bool = False,
    memory: int = 0,
    decay: float = 0.999,
) -> "Routed":
    """C clusters of w tokens for each head.

    Args:
        site: the place in the backbone.
        clusters: C.
        members: w, queries and keys of a cluster, at most all tokens; None for N / C. Paper: as this.
        cover: "local": the first half of the heads, rounded down, see consecutive tokens, in C groups of about N / C;
            "none": all heads are routed, and tokens that no cluster takes get zero.
        shared_qk: queries are also the keys, unit vectors then, and a token sees itself only where nothing else is.
        memory: learned keys and values that every cluster has besides.
        decay: of the average that a centroid is; 1 for centroids that stay.

    Raises:
        ValueError: a number that is none, an unknown cover.
    """
    values.whole("routing", "clusters", clusters, fix="set clusters to a number, e.g. 8")
    if members is not None:
        values.whole("routing", "members", members, fix="set members to a number of tokens, or null for N / clusters")
    values.whole("routing", "memory", memory, 0, fix="set memory to a number of keys, or 0 for none")
    values.choice("routing", "cover", cover, COVERS, fix="set cover")
    values.fraction("routing", "decay", decay, fix="set decay, e.g. 0.999")
    check_flags("routing", shared_qk=shared_qk)
    local = site.num_heads // 2 if cover == "local" else 0
    dim = head_channels(site)
    learned = (2, site.num_heads, clusters, memory, dim) if memory else None
    return Routed(Centroids(site.num_heads - local, clusters, dim, decay, learned), local, members, shared_qk)


class Routed(Layout):
    """Clusters by the centroids that a mixer owns.

    Args:
        content: the centroids of the heads that are routed.
        local: how many heads in front of those see consecutive tokens.
        members: w; None for N / C.
        masks: whether queries are also the keys, so that a token does not see itself.
    """

    keys = SCATTERED
    takes_prefix = False

    def __init__(self, content: Centroids, local: int = 0, members: int | None = None, masks: bool = False) -> None:
        self.content, self.heads, self.members, self.masks = content, local, members, masks

    def count(self, grid: Grid) -> int:
        """w on this map."""
        return min(self.members or -(-grid.cells // self.content.clusters), grid.cells)

    def local(self, grid: Grid) -> Grid:
        return Grid(1, self.count(grid))

    def kv_local(self, grid: Grid) -> Grid:
        memory = self.content.memory
        return Grid(1, self.count(grid) + (0 if memory is None else memory.shape[3]))

    def between(self, grid: Grid) -> Grid:
        return grid

    def mask(self, grid: Grid, device: torch.device) -> Tensor:
        """(C, T, S): a token of a cluster hardly sees itself."""
        itself = ITSELF * torch.eye(self.count(grid), device=device)
        itself = F.pad(itself, (self.kv_local(grid).width - len(itself), 0))
        return itself.expand(self.content.clusters, -1, -1)

    def gather(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, kv_grid: Grid, content: nn.Module | None) -> Groups:
        return self.routed(q, q if self.masks else k, v, grid, content)

    def routed(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, content: Centroids) -> Groups:
        """As `gather`, with the keys that are given."""
        k = F.normalize(k, dim=-1) if self.masks else k
        near = [F.normalize(t[:, self.heads :].float(), dim=-1) for t in ((q,) if self.masks else (q, k))]
        index, commitment = content(near, self.count(grid))
        if self.heads:
            around = self._consecutive(grid, q.device).expand(q.shape[0], self.heads, -1, -1)
            index = [torch.cat([around, routed], dim=1) for routed in index]
        groups = in_groups(q, k, v, index[0], index[-1])
        groups.losses["commitment"] = commitment
        return groups if content.memory is None else self._remembering(groups, content.memory)

    def _remembering(self, groups: Groups, memory_2MCnD: Tensor) -> Groups:
        """The same with keys and values of the cluster in front of those of its tokens."""
        times = groups.k.shape[0] // memory_2MCnD.shape[2]
        key, value = (t.transpose(0, 1).repeat(times, 1, 1, 1).to(groups.k.dtype) for t in memory_2MCnD)
        k, v = torch.cat([key, groups.k], dim=2), torch.cat([value, groups.v], dim=2)
        return groups._replace(k=k, v=v, kv_grid=Grid(1, k.shape[2]))

    def _consecutive(self, grid: Grid, device: torch.device) -> Tensor:
        """(C, T): tokens that follow each other, all of them in at least one group where w is N / C."""
        last = grid.cells - self.count(grid)
        first = torch.arange(self.content.clusters, device=device) * self.count(grid)
        return first.clamp_max(last)[:, None] + torch.arange(self.count(grid), device=device)
