"""Which keys a token has: the rule of neighbourhoods along one axis.

Source: the authors' kernels (NATTEN), Hassani et al., arXiv:2504.16922; without stride arXiv:2204.07143, and with
dilation arXiv:2209.15001.
"""

from typing import Any

import torch
from torch import Tensor


def keys_along(length: int, kernel: int, stride: int, dilation: int, device: Any = None) -> Tensor:
    """The rule along one axis of at least kernel·dilation cells: what each cell sees, (length, kernel).

    A cell p of the n in its residue class has the keys around the leader of its block of `stride` cells, moved inwards.
    """
    cell = torch.arange(length, device=device)
    residue, p = cell % dilation, cell // dilation
    n = (length - residue + dilation - 1) // dilation
    left, right = kernel // 2, kernel // 2 + kernel % 2 - 1
    leader = torch.minimum(p // stride * stride + stride // 2, n - 1)
    centre = torch.minimum(leader.clamp_min(left), n - 1 - right)
    first = (centre - left)[:, None] + torch.arange(kernel, device=device)
    return first * dilation + residue[:, None]


def first_key(p: int, n: int, kernel: int, stride: int) -> int:
    """The same of a cell p of a class of n, for the sizes of tiles: the leader needs no bound of its own."""
    return min(max(p // stride * stride + stride // 2 - kernel // 2, 0), n - kernel)


def first_query(key: int, kernel: int, stride: int) -> int:
    """The first cell that sees a key."""
    behind = key - (kernel - 1 - kernel // 2) - stride // 2
    return 0 if key < kernel else -(-behind // stride) * stride


def last_query(key: int, n: int, kernel: int, stride: int) -> int:
    """The last cell that sees a key."""
    block = (key + kernel // 2 - stride // 2) // stride
    return n - 1 if key >= n - kernel else min(block * stride + stride - 1, n - 1)
