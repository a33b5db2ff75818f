"""Clusters of similar queries: every head bisects its tokens until they are few; a cluster sees part of its sibling.

Source: BOAT: Bilateral Local Attention Vision Transformer, Yu et al., BMVC 2022, arXiv:2201.13027, section 3.2, and its
authors' laboratory's code, which takes N = cluster·2^k tokens only and, where that makes one cluster, pairs those of
neighbouring images in a batch. Here any N is cut evenly, sizes of clusters differing by at most one, into two clusters
at least. What goes where has no gradient, as there.
Shapes: B = batch, M = heads, N = H·W tokens, D = channels per head; R = clusters, T = tokens of one, S = its keys.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf import values
from kernels.order import sorted_stably
from models.attention.contract import Grid, Refused, Site
from models.attention.contract.layout import SCATTERED, Groups, Layout
from models.attention.layouts.clusters.gathering import in_groups

ROUNDS, SHARPNESS = 2, 100  # of the assignment to two centres


def boat(site: Site, *, cluster: int = 49, overlap: int = 20) -> "Bisected":
    """Clusters of at most `cluster` tokens that also see the nearest tokens of their sibling.

    Args:
        site: the place in the backbone.
        cluster: most tokens of a cluster; a map of fewer makes two clusters. Paper: 49.
        overlap: how many tokens of the sibling are seen, those next to the cut. Paper: 20.

    Raises:
        ValueError: a number that is none.
        Refused: a map of one token, which makes one cluster.
    """
    values.whole("boat", "cluster", cluster, fix="set cluster to a number of tokens, e.g. 49")
    values.whole("boat", "overlap", overlap, 0, fix="set overlap to a number of tokens, or 0 for none")
    if site.grid.cells == 1:
        raise Refused("one token makes one cluster", "choose attention=softmax, or a larger image_size")
    return Bisected(cluster, overlap)


class Bisected(Layout):
    """Clusters by what their queries hold."""

    keys = SCATTERED
    takes_prefix = False
    masks = True

    def __init__(self, cluster: int, overlap: int) -> None:
        self.cluster, self.overlap = cluster, overlap

    def sizes(self, tokens: int) -> list[int]:
        """Tokens of every cluster; they depend on their number alone."""
        cuts = max(1, math.ceil(math.log2(tokens / self.cluster)))
        sizes = [tokens]
        for _ in range(min(cuts, tokens.bit_length() - 1)):
            sizes = halved(sizes)
        return sizes

    def local(self, grid: Grid) -> Grid:
        return Grid(1, max(self.sizes(grid.cells)))

    def kv_local(self, grid: Grid) -> Grid:
        longest = max(self.sizes(grid.cells))
        return Grid(1, longest + min(self.overlap, longest) * (grid.cells > 1))

    def between(self, grid: Grid) -> Grid:
        return grid

    def gather(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, kv_grid: Grid, content: nn.Module | None) -> Groups:
        sizes = self.sizes(grid.cells)
        order_BMRT = clustered(q.detach(), sizes)
        slots_RS, seen_RS = self._seen(sizes, order_BMRT.shape[3], q.device)
        keys_BMRS = order_BMRT.flatten(2)[..., slots_RS.flatten()].unflatten(2, slots_RS.shape)
        if min(sizes) == max(sizes):
            return in_groups(q, k, v, order_BMRT, keys_BMRS)
        groups = in_groups(q, k, v, order_BMRT, keys_BMRS, kept_RT=filled(sizes, order_BMRT.shape[3], q.device))
        groups.given["mask"] = seen_RS[:, None].expand(-1, order_BMRT.shape[3], -1)
        return groups

    def _seen(self, sizes: list[int], most: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(R, S): places of the keys of each cluster in the order of all, and whether they are tokens."""
        rows = torch.arange(len(sizes), device=device)[:, None]
        own = torch.arange(most, device=device).expand(len(sizes), -1)
        if len(sizes) == 1:
            return own, own >= 0
        size = torch.tensor(sizes, device=device)[:, None]
        sibling, near = rows ^ 1, torch.arange(min(self.overlap, most), device=device)
        of_sibling = size[sibling.flatten()]
        taken = of_sibling.clamp_max(self.overlap)
        # the first of a pair sees the first tokens of the second, which sees the last of the first
        beside = torch.where(rows % 2 == 0, near, of_sibling - taken + near).clamp_max(most - 1)
        places = torch.cat([rows * most + own, sibling * most + beside], dim=1)
        return places, torch.cat([own < size, near < taken], dim=1)


@torch.no_grad()
def clustered(q_BMND: Tensor, sizes: list[int]) -> Tensor:
    """Which tokens are in each cluster, (B, M, R, T); clusters of fewer than T repeat their last."""
    B, M, N, _ = q_BMND.shape
    q, order, now = q_BMND.float(), torch.arange(N, device=q_BMND.device).expand(B, M, 1, N), [N]
    while len(now) < len(sizes):
        x_BMRTD = q.gather(2, order.flatten(2)[..., None].expand(-1, -1, -1, q.shape[-1])).unflatten(2, order.shape[2:])
        within = _halves(_cut(x_BMRTD, now), now)
        order = order.gather(3, within.flatten(3)).unflatten(3, (2, -1)).flatten(2, 3)
        now = halved(now)
    return order


def halved(sizes: list[int]) -> list[int]:
    """Each in two, the larger half first."""
    return [half for size in sizes for half in ((size + 1) // 2, size // 2)]


def _cut(x_BMRTD: Tensor, sizes: list[int]) -> Tensor:
    """Places (B, M, R, T) of the tokens of every group from the nearest of one centre to the nearest of the other."""
    inside = filled(sizes, x_BMRTD.shape[3], x_BMRTD.device)
    first = filled([(size + 1) // 2 for size in sizes], x_BMRTD.shape[3], x_BMRTD.device)
    halves_RT2 = torch.stack([first, inside & ~first], dim=-1).float()
    unit = F.normalize(x_BMRTD, dim=-1)
    centres = F.normalize((halves_RT2 / halves_RT2.sum(1, keepdim=True)).mT @ x_BMRTD, dim=-1)
    for _ in range(ROUNDS):
        near = (SHARPNESS * unit @ centres.mT).softmax(-1) * inside[..., None]
        centres = F.normalize(near.mT @ x_BMRTD, dim=-1)
    away = (unit @ centres.mT + 1).clamp_min(1e-12).unbind(-1)
    return sorted_stably((away[0] / away[1]).masked_fill(~inside, math.inf)).indices


def _halves(order_BMRT: Tensor, sizes: list[int]) -> Tensor:
    """Sorted groups cut in the middle, (B, M, R, 2, T/2 or one more); the shorter half repeats its last."""
    size = torch.tensor(sizes, device=order_BMRT.device)[:, None]
    first, place = (size + 1) // 2, torch.arange((order_BMRT.shape[3] + 1) // 2, device=order_BMRT.device)
    places = torch.stack([torch.minimum(place, first - 1), torch.minimum(first + place, size - 1)], dim=1)
    index = places.expand(*order_BMRT.shape[:2], *places.shape)
    return order_BMRT.gather(3, index.flatten(3)).view_as(index)


def filled(sizes: list[int], most: int, device: torch.device) -> Tensor:
    """(R, T): which of `most` places of every group hold a token."""
    return torch.arange(most, device=device) < torch.tensor(sizes, device=device)[:, None]
