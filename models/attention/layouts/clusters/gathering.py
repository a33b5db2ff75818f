"""Groups by index: every head has its own tokens in every group; a token in several groups gets their mean.

Shapes: B = batch, M = heads, N = tokens, D = channels per head; R = groups, T = queries of a group, S = its keys.
"""

import torch
from torch import Tensor

from models.attention.contract import Grid
from models.attention.contract.layout import Groups


def in_groups(
    q: Tensor, k: Tensor, v: Tensor, queries_BMRT: Tensor, keys_BMRS: Tensor, *, kept_RT: Tensor | None = None
) -> Groups:
    """Heads of the groups; a token that is in none gets zero.

    Args:
        q, k, v: (B, M, N, D).
        queries_BMRT, keys_BMRS: which tokens are the queries and keys of each group.
        kept_RT: False for places whose result is dropped, since they only fill a group up; None for none.
    """
    (B, M, N, _), (R, T) = q.shape, queries_BMRT.shape[2:]
    at = queries_BMRT.flatten(2)
    own = torch.ones(R * T, device=q.device) if kept_RT is None else kept_RT.flatten().float()
    times = torch.zeros(B, M, N, device=q.device).scatter_add(2, at, own.expand(B, M, -1)).clamp_min(1)

    def back(o_WMTD: Tensor) -> Tensor:
        o = o_WMTD.unflatten(0, (B, R)).transpose(1, 2).flatten(2, 3)
        o = o if kept_RT is None else o * own[:, None].to(o.dtype)
        summed = o.new_zeros(B, M, N, o.shape[-1]).scatter_add(2, _each(at, o), o)
        return summed / times[..., None].to(o.dtype)

    q, k, v = (taken(t, index) for t, index in ((q, queries_BMRT), (k, keys_BMRS), (v, keys_BMRS)))
    return Groups(q, k, v, Grid(1, T), Grid(1, keys_BMRS.shape[3]), {}, back, {})


def taken(t_BMND: Tensor, index_BMRS: Tensor) -> Tensor:
    """(B·R, M, S, D): the tokens of every group."""
    found = t_BMND.gather(2, _each(index_BMRS.flatten(2), t_BMND))
    return found.unflatten(2, index_BMRS.shape[2:]).transpose(1, 2).flatten(0, 1)


def _each(index_BMN: Tensor, like: Tensor) -> Tensor:
    """The same index for each channel."""
    return index_BMN[..., None].expand(-1, -1, -1, like.shape[-1])
