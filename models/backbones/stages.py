"""The stages of a hierarchical backbone: where its mixers go, what each stage gets, and the modules themselves."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from torch import nn

from conf.errors import UserError
from models.attention import AttentionFactory, Grid, Site, build
from models.backbones.base import pair
from models.layers.block import Stage, drop_path_rates
from models.layers.patch_embed import cells


def sites_of(
    kind: str,
    image_size: int | Sequence[int],
    *,
    strides: Sequence[int],
    dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int] | Mapping[int, int],
    stages: Sequence[int] | None = None,
    positioned: bool = False,
    last_prefix: int = 0,
) -> list[Site]:
    """The place of a mixer in every block of the given stages (all when None), in order; `num_heads` goes by stage.

    `last_prefix` tokens stand in front of the map of the last stage.
    """
    grids = [Grid(*cells(pair(image_size), stride)) for stride in strides]
    grids[-1] = grids[-1]._replace(prefix=last_prefix)
    return [
        Site(dims[s], num_heads[s], grids[s], s, block, depths[s], kind, positioned)
        for s in (range(len(dims)) if stages is None else stages)
        for block in range(depths[s])
    ]


def stages_of(
    attention: AttentionFactory | Sequence[AttentionFactory],
    sites: Sequence[Site],
    drop_path: float,
    *,
    block: Callable[[Site, nn.Module, float], nn.Module],
    between: Callable[[int], nn.Module],
    stage: Callable[[list[nn.Module], nn.Module | None], Stage] = Stage,
) -> nn.ModuleList:
    """One stage per group of sites, each block with its mixer and its drop path rate.

    Args:
        attention: factory of the token mixers, or a list with one per stage.
        sites: of all blocks in order, see `sites_of`.
        drop_path: rate of the last block; it grows linearly from 0 at the first.
        block: `(site, mixer, rate) -> block`.
        between: `s -> ` the module in front of stage s, which changes resolution and channels; not called for 0.
        stage: `(blocks, downsample) -> Stage`.

    Raises:
        ValueError: places that cannot take the mechanism (see `models.attention.build`), or a rate that is none.
    """
    rates = drop_path_rates(drop_path, len(sites))
    places = zip(sites, build(attention, sites), rates, strict=True)
    stages = nn.ModuleList()
    for s, of_stage in groupby(places, key=lambda place: place[0].stage):
        stages.append(stage([block(*place) for place in of_stage], between(s) if s else None))
    return stages


def check_lists(who: str, **options: Sequence[int]) -> None:
    """Refuses lists with one entry per stage that disagree about the number of stages or have entries below 1."""
    lengths = {name: len(values) for name, values in options.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(
            f"{who}: options with one entry per stage differ in length, got {lengths}; give as many of each"
        )
    for name, values in options.items():
        if min(values) < 1:
            raise UserError(f"{who}: {name} must be at least 1 in every stage, got {list(values)}; set model.{name}")


def heads_of(who: str, dim: int, head_dim: int) -> int:
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
