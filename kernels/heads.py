"""Tokens, their heads, and their maps: one taken for another without a copy where memory allows it.

Shapes: B = batch, N = prefix + H·W tokens in row-major order, C = M·D channels, M = heads, D = channels per head,
H W = map. A grid is (height, width) or (height, width, prefix).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(x_BNC: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts·M·D) → `parts` tensors (B, M, N, D), views of it.

    Their gradients are put side by side in one pass, where those of `unbind` would be stacked and then copied.
    """
    head_dim = x_BNC.shape[2] // (parts * num_heads)
    slices = (x_BNC,) if parts == 1 else x_BNC.split(num_heads * head_dim, 2)
    return tuple(part.unflatten(2, (num_heads, head_dim)).transpose(1, 2) for part in slices)


def merge_heads(x_BMND: Tensor) -> Tensor:
    """(B, M, N, D) → (B, N, M·D)."""
    x_BNMD = x_BMND.transpose(1, 2)
    if torch.compiler.is_exporting():  # whose second pass may lay out what PyTorch's attention gives in another way
        x_BNMD = x_BNMD.clone(memory_format=torch.contiguous_format)
    return x_BNMD.flatten(2)


def to_map(x_BNC: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The map tokens as a (B, C, H, W) view in channels_last memory; prefix tokens are left out. No copy."""
    height, width, prefix = (*grid, 0)[:3]
    return x_BNC[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_tokens(x_BCHW: Tensor, prefix_BPC: Tensor | None = None) -> Tensor:
    """(B, C, H, W) → (B, N, C), after the prefix tokens when they are given."""
    x_BNC = x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
    return x_BNC if prefix_BPC is None or not prefix_BPC.shape[1] else torch.cat([prefix_BPC, x_BNC], dim=1)


def heads_to_map(x_BMND: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, M, N, D) → the map (B, M·D, H, W) without prefix tokens, in channels_last memory."""
    return to_map(merge_heads(x_BMND), grid)


def map_to_heads(x_BCHW: Tensor, num_heads: int, prefix: int = 0) -> Tensor:
    """(B, M·D, H, W) → (B, M, N, D), with zeros for `prefix` tokens in front."""
    x_BMND = to_tokens(x_BCHW).unflatten(2, (num_heads, -1)).transpose(1, 2)
    return F.pad(x_BMND, (0, 0, prefix, 0)) if prefix else x_BMND


def gated(x_BMND: Tensor, gates_BNM: Tensor) -> Tensor:
    """Every head of every token times its gate; or every channel of it, with gates (B, N, M·D)."""
    return x_BMND * gates_BNM.unflatten(2, (x_BMND.shape[1], -1)).transpose(1, 2)
