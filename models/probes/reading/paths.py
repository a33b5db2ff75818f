"""Which cells of the picture the classifier reads from, by the matrices of all layers, from the last to the first.

It begins with what the classifier takes of each token of the last layer. A layer turns shares of its tokens into shares
of those before it by its matrix of all tokens on all tokens. Between stages with other maps a token's share is divided
evenly among the tokens in its place on the map before, as patch merging joins them; a class token that only begins
there keeps its share, which is then of no cell. What is no matrix moves nothing: MLPs, convolutions, gates.
Shapes: B = images, M = heads, N = prefix + H·W tokens, Q = rows of shares, one for what the classifier reads.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.looking import Point
from conf.values import choice
from models.attention import Grid, Mixer, mixers_of
from models.attention.recording import Call
from models.backbones.base import check_places
from models.pools.mean import Mean
from models.probes.reading.layers import kind_of
from models.probes.reading.points import token_at

STAGES = ("last", "all")
MOST = 4096  # cells of a map whose matrices are multiplied


def followed_back(
    reads_BQN: Tensor, calls: dict[str, Call], step: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor, Grid]]:
    """The name of each layer from the last to the first, what is read of the tokens it is given, and their map.

    Args:
        reads_BQN: of what the last layer gives.
        calls: of the layers, in order.
        step: `(name, reads of what the layer gives) -> reads of what it is given`.
    """
    after = None
    for name, call in reversed(calls.items()):
        reads_BQN = reads_BQN if after is None else onto(reads_BQN, after, call.grid)
        reads_BQN, after = step(name, reads_BQN), call.grid
        yield name, reads_BQN, call.grid


def onto(reads_BQN: Tensor, after: Grid, before: Grid) -> Tensor:
    """Shares of the tokens of a stage as shares of those of the stage before it, see above."""
    if after == before:
        return reads_BQN
    sides = zip(before[:2], after[:2], strict=True)
    rows, columns = (torch.arange(old, device=reads_BQN.device) * new // old for old, new in sides)
    place = (rows[:, None] * after.width + columns).flatten()
    shares_BQN = reads_BQN[..., after.prefix :] / torch.bincount(place, minlength=after.cells)
    kept = min(after.prefix, before.prefix)
    new = reads_BQN.new_zeros(*reads_BQN.shape[:2], before.prefix - kept)
    return torch.cat([reads_BQN[..., :kept], new, shares_BQN[..., place]], dim=-1)


def as_map(reads_BQN: Tensor, grid: Grid) -> Tensor:
    """Shares of the cells alone, (B, Q, H, W)."""
    return reads_BQN[..., grid.prefix :].unflatten(-1, grid[:2])


def followed(who: str, model: nn.Module, stages: str, stochastic: bool = False, most: int = MOST) -> dict[str, Mixer]:
    """The mixers whose matrices are multiplied, by name: of the last stages with one map, or of all.

    Args:
        who: names the probe.
        model: any classifier.
        stages: "last" or "all".
        stochastic: whether the rows of all matrices must sum to one.
        most: cells of the first map.

    Raises:
        UserError: a layer has no such matrix, or the map too many cells.
    """
    choice("probe", "stages", stages, STAGES, fix="set probe.stages=last")
    check_places(model, who)
    mixers = dict(mixers_of(model))
    if not mixers:
        raise UserError(f"{who}: {type(model).__name__} has no attention; choose e.g. model=vit_tiny")
    if getattr(model, "reducers", None) is not None:
        raise UserError(f"{who}: the tokens that are left make up no map, got a reducer; choose a model without one")
    if getattr(model, "wrapper", None) is not None:
        name = type(model.wrapper).__name__
        raise UserError(f"{who}: a wrapper has layers of its own, got {name}; leave wrapper= out")
    if getattr(model, "class_stage", None) is not None:
        raise UserError(
            f"{who}: behind the last layer class attention reads the map, which is not followed, got "
            f"{type(model).__name__}; choose e.g. probe=normgrad, or a model with class_token=false"
        )
    names = list(mixers) if stages == "all" else _on_the_last_map(mixers)
    for name in names:
        if (lack := _lack(mixers[name], stochastic)) is not None:
            last = [mixers[other] for other in _on_the_last_map(mixers)]
            less = stages == "all" and all(_lack(mixer, stochastic) is None for mixer in last)
            other = "relevance" if mixers[name].has_matrix else "normgrad"
            fix = "set probe.stages=last" if less else f"choose e.g. probe={other}"
            raise UserError(f"{who}: {name} ({kind_of(mixers[name])}) has no {lack}; {fix}")
    cells = mixers[names[0]].site.grid.cells
    if cells > most:
        fix = "set probe.stages=last" if stages == "all" else "choose a smaller image_size or model"
        raise UserError(f"{who}: a map of at most {most} cells is followed, got {cells} in {names[0]}; {fix}")
    return {name: mixers[name] for name in names}


def _on_the_last_map(mixers: dict[str, Mixer]) -> list[str]:
    sides = [mixer.site.grid[:2] for mixer in mixers.values()]
    same = next((i for i, side in enumerate(reversed(sides)) if side != sides[-1]), len(sides))
    return list(mixers)[len(sides) - same :]


def _lack(mixer: Mixer, stochastic: bool) -> str | None:
    """What a layer would need; None for nothing."""
    if not mixer.has_matrix:
        return f"attention matrix, since {mixer.without_matrix}"
    return "attention matrix whose rows sum to one" if stochastic and not mixer.row_stochastic else None


@torch.no_grad()
def readers(model: nn.Module, images_BCHW: Tensor, grid: Grid, point: Point | None = None) -> Tensor:
    """How much the classifier takes of each token of the last layer, (B, 1, N); with a point, all of the token there.

    All of the class token where there is one; else what the weights of the pool say, or the same of every cell.
    """
    reads_BN = images_BCHW.new_zeros(len(images_BCHW), grid.tokens)
    pooling = getattr(model, "pooling", None)
    weights = None if pooling is None or point is not None else model.forward_pooled(images_BCHW).weights
    if point is not None:
        reads_BN[:, token_at(point, grid)] = 1
    elif weights is not None:
        reads_BN[:, grid.prefix :] = weights.mean(1)[:, -grid.cells :]
    elif grid.prefix and not isinstance(pooling, Mean):
        reads_BN[:, 0] = 1
    else:
        reads_BN[:, grid.prefix :] = 1
    return (reads_BN / reads_BN.sum(-1, keepdim=True))[:, None]
