"""Heads of tokens: taken apart, put together, gated, and as channels of a map.

Shapes: B = batch, N = prefix + H·W tokens, C = channels, M = heads, D = channels per head, H W = map.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.heads import heads_to_map as heads_to_map
from kernels.heads import map_to_heads as map_to_heads
from kernels.heads import merge_heads as merge_heads
from kernels.heads import split_heads as split_heads
from models.attention.contract import Grid, Refused, Site


def gated_heads(x_BNC: Tensor, gates_BNM: Tensor | None) -> Tensor:
    """The heads of every token, next to each other in its channels, times their gates; unchanged without gates.

    Gates are one per head, (B, N, M), or one per channel of it, (B, N, M·D).
    """
    if gates_BNM is None:
        return x_BNC
    return (x_BNC.unflatten(-1, (gates_BNM.shape[-1], -1)) * gates_BNM.unsqueeze(-1)).flatten(-2)


def map_of(v_BMSD: Tensor, kv_grid: Grid, grid: Grid) -> Tensor:
    """Values on the map of the queries, (B, M·D, H, W): enlarged bilinearly where their own is smaller."""
    v_BCYX = heads_to_map(v_BMSD, kv_grid)
    return v_BCYX if kv_grid[:2] == grid[:2] else F.interpolate(v_BCYX, size=grid[:2], mode="bilinear")


def head_channels(site: Site, even: bool = False) -> int:
    """D: what the site says, or C / M, which must be whole.

    Args:
        site: the place in the backbone.
        even: refuse heads whose M·D channels are not the C of the tokens, as a mechanism must that divides C.
    """
    if site.head_dim is not None:
        if even and site.head_dim * site.num_heads != site.dim:
            raise Refused(
                f"{site.num_heads} heads of {site.head_dim} channels are not the {site.dim} channels of the tokens, "
                "which it divides among its heads",
                "change model.num_heads or model.head_dim, or choose attention=softmax",
            )
        return site.head_dim
    if site.dim % site.num_heads:
        raise Refused(
            f"{site.dim} channels do not divide into {site.num_heads} heads", "change model.num_heads or model.dim"
        )
    return site.dim // site.num_heads
