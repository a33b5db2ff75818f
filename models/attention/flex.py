"""Softmax attention over a map by PyTorch's FlexAttention: biases of offsets and neighbourhoods without a dense matrix.

    o = softmax(q kᵀ / √D + table[offset]) v      over all keys, or over those of the neighbourhood

Source: FlexAttention, Dong et al., MLSys 2025, arXiv:2412.05496; torch.nn.attention.flex_attention, which every release
has that requirements.txt admits. A bias of offsets is a table (M, 2h+1, 2w+1), made once per call and read inside the
kernel, through which its gradient flows, summed in an order that may change from run to run. A neighbourhood is a mask
whose blocks are found once per map. Every layout and map has a compiled kernel of its own. On CPUs there is no backward
pass, and it serves the tests alone; on a GPU it was neither run nor measured.
Shapes: B = batch, M = heads, N = prefix + H·W tokens, D = channels per head.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kernels.dispatch import check_tensors, is_transformed
from models.attention.contract import Grid
from models.attention.contract.layout import Around
from models.attention.contract.places import OfOffset

WHO = "flex_attention"
NARROWEST_HEAD = 16  # channels per head that a dot product in Triton takes


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    *,
    scale: float,
    bias: OfOffset | None = None,
    around: Around | None = None,
) -> Tensor:
    """(B, M, N, D) of tokens on a map that see each other.

    Args:
        q, k, v: (B, M, N, D).
        grid: their map.
        scale: of the logits.
        bias: a number per head and offset, added to them; None for none.
        around: the neighbourhoods; None for the whole map.

    Raises:
        ValueError: dtypes that no kernel takes.
    """
    check_tensors(WHO, {"q": q, "k": k, "v": v})
    scored = None if bias is None else score_mod(bias, grid, around, q.device)
    # what is made of fake tensors, in an export, or inside of torch.func, is not kept
    kept = type(q) is Tensor and not is_transformed(q)
    find = block_mask if kept else block_mask.__wrapped__
    seen = None if around is None else find(grid, around, q.device)
    alone = q.is_cuda and not torch.compiler.is_compiling()  # else part of what is compiled
    compute = compiled(grid, around) if alone else flex_attention
    return compute(q, k, v, score_mod=scored, block_mask=seen, scale=scale)


def score_mod(bias: OfOffset, grid: Grid, around: Around | None, device: torch.device) -> Callable[..., Tensor]:
    """What adds the bias to a logit; tokens in front of the map have its neutral number."""
    width, prefix, neutral = grid.width, grid.prefix, bias.neutral
    (far_y, far_x), (step_y, step_x) = ((grid.height - 1, width - 1), (1, 1)) if around is None else _reach(around)
    axes = [torch.arange(-far, far + 1, device=device, dtype=torch.float32) for far in (far_y, far_x)]
    table_MYX = bias.at(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)).float().contiguous()

    def add(logit: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        i, j = (query - prefix).clamp(min=0), (key - prefix).clamp(min=0)
        y = (i // width // step_y - j // width // step_y).clamp(-far_y, far_y)
        x = (i % width // step_x - j % width // step_x).clamp(-far_x, far_x)
        added = table_MYX[head, y + far_y, x + far_x]
        return logit + (torch.where((query < prefix) | (key < prefix), neutral, added) if prefix else added)

    return add


def _reach(around: Around) -> tuple[tuple[int, int], tuple[int, int]]:
    """How far keys may lie from a query, counted in steps of the dilation; and these."""
    return (around.kernel[0] - 1, around.kernel[1] - 1), around.dilation


@lru_cache(maxsize=64)
def block_mask(grid: Grid, around: Around, device: torch.device) -> BlockMask:
    """Which blocks of queries and keys hold a pair that may attend, on this map."""
    with torch.inference_mode(False), torch.no_grad():
        rows, columns = (_sees(keys) for keys in around.axes(grid, device))
        width = grid.width

        def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return rows[query // width, key // width] & columns[query % width, key % width]

        create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
        return create(sees, None, None, grid.cells, grid.cells, device=device)


def _sees(keys: Tensor) -> Tensor:
    """(side, side), True where a cell has the other among its keys (side, K)."""
    none = torch.zeros(len(keys), len(keys), dtype=torch.bool, device=keys.device)
    return none.scatter(1, keys, True)


@cache
def compiled(grid: Grid, around: Around | None) -> Callable[..., Tensor]:
    """FlexAttention compiled for one layout on one map; fails where it would be computed pair by pair instead.

    It has a code object of its own, since Dynamo counts the recompilations that it allows by these.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return flex_attention(q, k, v, **given)

    own = FunctionType(call.__code__.replace(), call.__globals__, name=WHO, closure=call.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)
