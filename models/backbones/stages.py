"""Stages: what each gets where only some have attention, how many heads, and those of equal depth."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from conf.errors import UserError
from models.attention import AttentionFactory
from models.layers.block import Stage


def whole_heads(who: str, dim: int, head_dim: int) -> int:
    """How many heads of `head_dim` channels make up `dim`."""
    if dim % head_dim:
        raise UserError(
            f"{who}: {dim} channels are not a multiple of head_dim, got {head_dim}; change model.dims or model.head_dim"
        )
    return dim // head_dim


def per_stage(
    who: str, attention: AttentionFactory | Sequence[AttentionFactory | None], chosen: Sequence[int], stages: int
) -> list[AttentionFactory | None]:
    """What each stage gets: the injected attention in the chosen stages, None in the others.

    A list is taken as it is, with None where there is no attention; what would go unnoticed is refused.

    Raises:
        ValueError: no stage or one that does not exist, or a list that does not go with the chosen stages.
    """
    if not chosen or not set(chosen) <= set(range(stages)):
        raise UserError(
            f"{who}: attention_stages must name at least one of the stages 0 to {stages - 1}, got {list(chosen)}; "
            "set model.attention_stages"
        )
    if not isinstance(attention, Sequence):
        return [attention if s in chosen else None for s in range(stages)]
    given = [s for s, factory in enumerate(attention) if factory is not None]
    if len(attention) != stages or set(given) != set(chosen):
        raise UserError(
            f"{who}: a list of mechanisms has {stages} entries, null for stages not in attention_stages, "
            f"{list(chosen)}, got {len(attention)} entries with mechanisms for {given}; change either list"
        )
    return list(attention)


def quarters(blocks: Sequence[nn.Module], last: int | None = None) -> nn.ModuleList:
    """Four stages of a backbone with one map, which a pyramid taps behind each: of equal depth.

    With `last` the fourth begins at that block, and the three in front of it are of equal depth, the first the deepest.
    """
    depth = len(blocks)
    taps = [round(depth * i / 4) for i in range(5)] if last is None else [*(-(-last * i // 3) for i in range(4)), depth]
    return nn.ModuleList(Stage(list(blocks[a:b])) for a, b in pairwise(taps))
