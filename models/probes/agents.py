"""What agents do: what each of them gathers from the tokens, and which tokens read it, over the picture.

In windows every window has agents of its own; the map of an agent then shows those of the same number in all windows.
Heads in stripes of two directions are two layers, as their agents are others.
Shapes: B = images, M = heads, N = prefix + H·W tokens, S = keys, A = agents.
"""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf.values import refuse, whole
from data.order.spread import spread_over
from models.attention.agent import AgentCore
from models.attention.contract import Grid, Mixer
from models.attention.contract.layout import SAME
from models.attention.cross_shaped import CrossShaped
from models.attention.gating import ungated
from models.attention.multihead import MultiHead
from models.attention.recording import recorded
from models.backbones.base import check_places
from models.probes import Report
from models.probes.drawing.overlays import MOST, enlarged, overlay, sheet
from models.probes.reading.heads import check_head, check_heads
from models.probes.reading.images import Images, first_images
from models.probes.reading.layers import chosen_layers

WHO = "agents"


class Agents(NamedTuple):
    """Of one layer: what the agents gather of every key (B, M, S, A), and every token reads of the agents (B, M, N, A).

    kv_grid, grid: the maps of the keys and of the tokens. sides: of the grid of agents. whole: whether they belong to
    the whole map, and to no windows.
    """

    gathered: Tensor
    read: Tensor
    kv_grid: Grid
    grid: Grid
    sides: tuple[int, int]
    whole: bool


def agents(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    input: Any = None,
    images: int = 4,
    layers: Any = "all",
    heads: str | int = "mean",
    shown: int = 6,
) -> Report:
    """A picture for each image: two rows for each layer, what agents gather and who reads them, a panel for each.

    Args:
        model, data, trainer, input: see `models.probes`.
        images: how many pictures.
        layers: which layers; see `models.probes.reading.layers.chosen_layers`.
        heads: "mean", the number of one, or "each".
        shown: agents, spread over their grid.

    Raises:
        UserError: an option that has no meaning, or a model or layer without agents.
    """
    check_heads(heads)
    if whole("probe", "shown", shown, fix="set probe.shown=6") >= MOST:
        refuse("probe", "shown", f"at most {MOST - 1} agents", shown, "set probe.shown=6")
    check_places(model, WHO)
    mixers = chosen_layers(WHO, model, layers, has_agents, "agents", "attention=agent")
    check_head(heads, {name: ungated(mixer).num_heads for name, mixer in mixers.items()})
    seen = first_images(data, images, trainer.strategy.root_device)
    found = agents_of(model, mixers, seen.batch)
    pictures = {name: _picture(found, seen, i, heads, shown) for i, name in enumerate(seen.names)}
    said = "rows in turn: what each agent gathers from the picture, and which tokens read it; a cross is its place"
    figures = {name: summed(one) for name, one in found.items()}
    return Report(
        {f"{name}/{what}": value for name, one in figures.items() for what, value in one.items()},
        rows={name: _told(one) for name, one in figures.items()},
        tables={"agents": [row for name, one in found.items() for row in _table(name, one)]},
        pictures=pictures,
        captions={name: f"{name}: {said}" for name in pictures},
    )


def has_agents(mixer: Mixer) -> bool:
    """Whether it attends through agents, be its heads gated or not."""
    inside = ungated(mixer)
    core = inside.cores[0] if isinstance(inside, CrossShaped) else getattr(inside, "core", None)
    return isinstance(inside, MultiHead | CrossShaped) and isinstance(core, AgentCore)


@torch.no_grad()
def agents_of(model: nn.Module, mixers: dict[str, Mixer], batch: Tensor) -> dict[str, Agents]:
    """Of these mixers by name, for a batch of images."""
    with recorded(model) as calls:
        model(batch)
    found = {}
    for name, mixer in mixers.items():
        (x_BNC, grid), inside = calls[name], ungated(mixer)
        if isinstance(inside, CrossShaped):
            found |= {f"{name}.{word}": one for word, one in _in_stripes(inside, x_BNC, grid).items()}
        else:
            found[name] = _of(inside, x_BNC, grid)
    return found


def _in_stripes(mixer: CrossShaped, x_BNC: Tensor, grid: Grid) -> dict[str, Agents]:
    x_BNC, found = x_BNC if mixer.pre is None else mixer.pre(x_BNC, grid), {}
    for direction, word in enumerate(("vertical", "horizontal")):
        q, k, _, stripe = mixer.stripes(direction, x_BNC, grid)
        gathered, read = mixer.cores[direction].paths(q, k, stripe, stripe)
        on_map = (mixer.put_back(t, grid, stripe) for t in (gathered.mT, read))
        found[word] = Agents(*on_map, grid, grid, mixer.cores[direction].agents, len(q) == len(x_BNC))
    return found


def _of(mixer: MultiHead, x_BNC: Tensor, grid: Grid) -> Agents:
    groups = mixer.groups(x_BNC, grid)
    gathered, read = mixer.core.paths(groups.q, groups.k, groups.grid, groups.kv_grid)
    read_BMNA, same = mixer.put_back(read, groups, grid), mixer.layout.keys == SAME
    gathered_BMSA = mixer.put_back(gathered.mT, groups, grid) if same else gathered.mT
    alone = len(groups.q) == len(x_BNC)
    return Agents(gathered_BMSA, read_BMNA, grid if same else groups.kv_grid, grid, mixer.core.agents, alone)


def summed(one: Agents) -> dict[str, float]:
    """How many agents there are; entropies in nats of what an agent gathers and a token reads; the loads of agents."""
    load = _loads(one).mean(0)
    return {
        "agents": len(load),
        "gathered_entropy": _entropy_of_gathered(one).mean().item(),
        "read_entropy": torch.special.entr(one.read.float()).sum(-1).mean().item(),
        "smallest_load": load.min().item(),
        "largest_load": load.max().item(),
    }


def _loads(one: Agents) -> Tensor:
    """(M, A): the share of agents in what the tokens read."""
    return one.read.float().mean((0, 2))


def _entropy_of_gathered(one: Agents) -> Tensor:
    """(M, A), of the shares of the keys, of the same agents of all windows together."""
    gathered = one.gathered.float()
    return torch.special.entr(gathered / gathered.sum(2, keepdim=True)).sum(2).mean(0)


def _table(name: str, one: Agents) -> list[dict[str, Any]]:
    """A row for each head and agent."""
    loads, entropies = _loads(one).tolist(), _entropy_of_gathered(one).tolist()
    return [
        {"layer": name, "head": head, "agent": agent}
        | {"row": agent // one.sides[1], "column": agent % one.sides[1]}
        | {"load": load, "gathered_entropy": entropies[head][agent]}
        for head, of_head in enumerate(loads)
        for agent, load in enumerate(of_head)
    ]


def _told(figures: dict[str, float]) -> str:
    return (
        f"{figures['agents']} agents, read by {figures['smallest_load']:.1%} to {figures['largest_load']:.1%}, entropy "
        f"{figures['gathered_entropy']:.2f} gathered, {figures['read_entropy']:.2f} read"
    )


def _picture(found: dict[str, Agents], seen: Images, number: int, heads: str | int, shown: int) -> Any:
    """Two rows for each layer and head."""
    picture, rows = seen.shown[number], []
    for name, one in found.items():
        for word, chosen in _heads(heads, one.read.shape[1]):
            gathered_SA, read_NA = (t[number, chosen].float().mean(0) for t in (one.gathered, one.read))
            first, second = (enlarged(picture), f"{name}{word}"), (enlarged(picture), "read by")
            rows.append([first, *_panels(picture, gathered_SA, one.kv_grid, one, shown)])
            rows.append([second, *_panels(picture, read_NA, one.grid, one, shown)])
    return sheet(rows)


def _heads(heads: str | int, count: int) -> list[tuple[str, list[int]]]:
    """What is drawn of so many heads: a word for it, and which heads it is the mean of."""
    if heads == "mean":
        return [("", list(range(count)))]
    return [(f" head {head}", [head]) for head in (range(count) if heads == "each" else [heads])]


def _panels(picture: Any, maps_NA: Tensor, grid: Grid, one: Agents, shown: int) -> list[tuple[Any, str]]:
    """Some agents, marked at their place."""
    rows, columns = one.sides
    panels = []
    for agent in spread_over(maps_NA.shape[1], shown):
        place = ((agent % columns + 0.5) / columns, (agent // columns + 0.5) / rows) if one.whole else None
        weights_HW = maps_NA[grid.prefix :, agent].unflatten(0, grid[:2])
        panels.append((overlay(picture, weights_HW, point=place), f"agent {agent}"))
    return panels
