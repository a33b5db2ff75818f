"""What the mixers of a model do with a few images, in plain numbers: how evenly they look, and where.

entropy         of the weights of a query, mean over queries, heads and images, in units of the logarithm of the
                keys: 1 for an even look, 0 for one key. Weights below zero count by their size.
routes_used     the share of a map's regions that any region of it visits (BiFormer)
load_min, load_max   the share of tokens that use the least and the most used routed head (mixture of heads)
router_entropy  of the scores of the routed heads: 1 for an undecided router, 0 for a sure one
"""

import math

import torch
from torch import Tensor, nn

from models.attention import Grid, Mixer, mixers_of
from models.attention.agent import AgentCore
from models.attention.gating import ungated
from models.attention.head_router import HeadRouter
from models.attention.multihead import MultiHead
from models.attention.recording import recorded


@torch.no_grad()
def figures_of(model: nn.Module, *inputs: Tensor) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Figures of every mixer by its name, for one forward pass, and its routes (B, R, K) where it has any.

    The model is called as it stands: set it to evaluation first. A mixer without matrix and routes has no figures.
    """
    routers = {mixer: [r for r in mixer.modules() if isinstance(r, HeadRouter)] for _, mixer in mixers_of(model)}
    for router in (router for those in routers.values() for router in those):
        router.watch()
    with recorded(model) as calls:
        model(*inputs)
    found, routes = {}, {}
    for name, mixer in mixers_of(model):
        figures = _loads(routers[mixer])
        if name in calls:
            x_BNC, grid = calls[name]
            if (entropy := entropy_of(mixer, x_BNC, grid)) is not None:
                figures["entropy"] = entropy
            figures |= agents_of(mixer, x_BNC, grid)
            if (chosen := routes_of(mixer, x_BNC, grid)) is not None:
                routes[name] = chosen
                figures["routes_used"] = _used(chosen)
        found[name] = figures
    return {name: figures for name, figures in found.items() if figures}, routes


def entropy_of(mixer: Mixer, x_BNC: Tensor, grid: Grid) -> float | None:
    """See the module's docstring; None where there is no matrix. One image at a time: matrices are large."""
    if not mixer.has_matrix:
        return None
    means = []
    for x_1NC in x_BNC.split(1):
        means.append(_evenness(mixer.attention_matrix(x_1NC, grid)))
    return sum(means) / len(means)


def agents_of(mixer: Mixer, x_BNC: Tensor, grid: Grid) -> dict[str, float]:
    """See the module's docstring; {} without agents."""
    inside = ungated(mixer)
    if not (isinstance(inside, MultiHead) and isinstance(inside.core, AgentCore)):
        return {}
    groups = inside.groups(x_BNC, grid)
    gathered, read = inside.core.paths(groups.q, groups.k, groups.grid, groups.kv_grid)
    return {"agents_gathered": _evenness(gathered), "agents_read": _evenness(read)}


def _evenness(weights: Tensor) -> float:
    """The mean entropy of the last axis, in units of the logarithm of its length."""
    sizes = weights.float().abs()
    shares = sizes / sizes.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return float(torch.special.entr(shares).sum(-1).mean()) / math.log(max(2, weights.shape[-1]))


def routes_of(mixer: Mixer, x_BNC: Tensor, grid: Grid) -> Tensor | None:
    """Regions (B, R, K) that each region visits; None where a mixer has none."""
    routes = getattr(ungated(mixer), "routes", None)
    return None if routes is None else routes(x_BNC, grid)


def changed(before_BRK: Tensor, now_BRK: Tensor) -> float:
    """The share of routes that were none before."""
    return float((now_BRK[..., None] != before_BRK[..., None, :]).all(-1).float().mean())


def _used(routes_BRK: Tensor) -> float:
    B, R, _ = routes_BRK.shape
    visited_BR = torch.zeros(B, R, device=routes_BRK.device).scatter(1, routes_BRK.flatten(1), 1.0)
    return float(visited_BR.mean())


def _loads(routers: list[HeadRouter]) -> dict[str, float]:
    """Of the routers of a mixer, which were watched; to be called in all processes."""
    seen = [found for found in (router.seen() for router in routers) if found is not None]
    if not seen:
        return {}
    loads = [load for one in seen for load in one.load]
    entropy = sum(one.entropy for one in seen) / len(seen)
    return {"load_min": min(loads), "load_max": max(loads), "router_entropy": entropy}
