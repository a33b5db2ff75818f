"""Heads of tokens: taken apart, put together, gated, and as channels of a map.

Shapes: B = batch, N = prefix + H·W tokens, C = channels, M = heads, D = channels per head, H W = map.
"""

import torch.nn.functional as F
from torch import Tensor

from models.attention import Grid, Refused, Site
from models.layers.tokens import to_map, to_tokens


def split_heads(x_BNC: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts·M·D) → `parts` tensors (B, M, N, D)."""
    head_dim = x_BNC.shape[2] // (parts * num_heads)
    return x_BNC.unflatten(2, (parts, num_heads, head_dim)).permute(2, 0, 3, 1, 4).unbind()


def merge_heads(x_BMND: Tensor) -> Tensor:
    """(B, M, N, D) → (B, N, M·D)."""
    return x_BMND.transpose(1, 2).flatten(2)


def heads_to_map(x_BMND: Tensor, grid: Grid) -> Tensor:
    """(B, M, N, D) → the map (B, M·D, H, W) without prefix tokens, in channels_last memory."""
    return to_map(merge_heads(x_BMND), grid)


def map_to_heads(x_BCHW: Tensor, num_heads: int, prefix: int = 0) -> Tensor:
    """(B, M·D, H, W) → (B, M, N, D), with zeros for `prefix` tokens in front."""
    x_BMND = to_tokens(x_BCHW).unflatten(2, (num_heads, -1)).transpose(1, 2)
    return F.pad(x_BMND, (0, 0, prefix, 0)) if prefix else x_BMND


def gated_heads(x_BNC: Tensor, gates_BNM: Tensor | None) -> Tensor:
    """The heads of every token, next to each other in its channels, times their gates; unchanged without gates."""
    if gates_BNM is None:
        return x_BNC
    return (x_BNC.unflatten(-1, (gates_BNM.shape[-1], -1)) * gates_BNM.unsqueeze(-1)).flatten(-2)


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
