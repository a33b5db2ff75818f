"""Where the regions of a BiFormer look: which ones each of them attends to, layer by layer, over the picture.

Shapes: B = images, R = regions, K = regions attended to.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from conf import looking
from conf.errors import UserError
from conf.looking import Point
from conf.values import whole
from models.attention.biformer import BiLevelRoutingAttention, Regions
from models.attention.contract import Grid, Mixer
from models.attention.gating import ungated
from models.attention.recording import recorded
from models.backbones.base import check_places
from models.probes import Report, Subject
from models.probes.drawing.overlays import MOST, enlarged, sheet
from models.probes.reading.images import Images, first_images
from models.probes.reading.layers import chosen_layers
from models.probes.reading.points import token_at

WHO = "routing_map"
VISITED, ASKING = (31, 119, 180), (255, 127, 14)  # blue, orange
FAINT, STRONG = 130, 190  # opacity of the last and of the best of the regions that are visited, of 255


class Routes(NamedTuple):
    """Of one layer: the regions (B, R, K) that each region attends to, best first; how the map is cut, and the map."""

    routes_BRK: Tensor
    regions: Regions
    grid: Grid


def routing_map(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    subject: Subject,
    input: Any = None,
    images: int = 4,
    layers: Any = "all",
    point: Any = None,
    every: int | None = None,
) -> Report:
    """The regions that are visited, framed on the picture: orange asks, blue is attended to, the stronger the better.

    Args:
        model, data, trainer, subject, input: see `models.probes`.
        images: how many pictures.
        layers: which layers; see `models.probes.reading.layers.chosen_layers`.
        point: where the region lies that asks, as fractions from the left and from the top; None for the centre.
        every: every how many-th region asks instead, in a picture for each layer.

    Raises:
        UserError: an option that has no meaning, or a model or layer without routes.
    """
    place = looking.point(point)
    if every is not None:
        whole("probe", "every", every, fix="set probe.every=8, or null for the region at a point")
        if place is not None:
            raise UserError(f"probe: point and every both say who asks, got {point} and {every}; leave one of them out")
    check_places(model, WHO)
    mixers = chosen_layers(WHO, model, layers, routed, "router of regions", "a biformer")
    shown = first_images(data, images, trainer.strategy.root_device)
    found = routes_of(model, mixers, shown.batch)
    if every is None:
        pictures, captions = _at_point(found, shown, place)
    else:
        pictures, captions = _of_every(found, shown, every)
    figures = {f"{name}/{what}": value for name, one in found.items() for what, value in summed(one).items()}
    return Report(
        figures,
        rows={name: _told(one) for name, one in found.items()},
        tables={"routes": [row for name, one in found.items() for row in _table(name, one, shown.names)]},
        pictures=pictures,
        captions=captions,
        lines=_beyond(found),
    )


def routed(mixer: Mixer) -> bool:
    """Whether it attends along routes, be its heads gated or not."""
    return isinstance(ungated(mixer), BiLevelRoutingAttention)


@torch.no_grad()
def routes_of(model: nn.Module, mixers: dict[str, Mixer], batch: Tensor) -> dict[str, Routes]:
    """Of these mixers by name, for a batch of images."""
    with recorded(model) as calls:
        model(batch)
    found = {}
    for name, mixer in mixers.items():
        (x_BNC, grid), routing = calls[name], ungated(mixer)
        found[name] = Routes(routing.routes(x_BNC, grid).cpu(), routing.regions(grid), grid)
    return found


def summed(one: Routes) -> dict[str, float]:
    """How many regions there are and are attended to; the shares of regions that see themselves and of those seen."""
    R, K = one.routes_BRK.shape[1:]
    own = (one.routes_BRK == torch.arange(R)[:, None]).any(-1)
    seen = torch.zeros(len(own), R).scatter(1, one.routes_BRK.flatten(1), 1.0)
    return {"regions": R, "visited": K, "own": own.float().mean().item(), "seen": seen.mean().item()}


def region_at(point: Point | None, regions: Regions, grid: Grid) -> int:
    """The number of the region in which a point lies, None for the centre."""
    row, column = divmod(token_at(point, grid), grid.width)
    return row // regions.height * regions.columns + column // regions.width


def drawn(picture: Image.Image, one: Routes, asking: int, visited: Sequence[int]) -> Image.Image:
    """A grey picture with the regions that one attends to, best first, and a frame around that one."""
    base = enlarged(picture).convert("L").convert("RGBA")
    film = Image.new("RGBA", base.size)
    pen = ImageDraw.Draw(film)
    boxes = [_box(region, one, base.size) for region in visited]
    for rank, box in enumerate(boxes):
        if box is not None:
            opacity = STRONG - (STRONG - FAINT) * rank // max(len(boxes) - 1, 1)
            pen.rectangle(box, fill=(*VISITED, opacity), outline=(*VISITED, 255))
    if (frame := _box(asking, one, base.size)) is not None:
        pen.rectangle(frame, outline=(*ASKING, 255), width=max(3, base.width // 60))
    return Image.alpha_composite(base, film).convert("RGB")


def _box(region: int, one: Routes, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of a region in pixels; None for one that lies beyond the map, in padding."""
    row, column = divmod(region, one.regions.columns)
    top, left = row * one.regions.height, column * one.regions.width
    if top >= one.grid.height or left >= one.grid.width:
        return None
    x, y = size[0] / one.grid.width, size[1] / one.grid.height
    right, bottom = min(left + one.regions.width, one.grid.width), min(top + one.regions.height, one.grid.height)
    return round(left * x), round(top * y), round(right * x) - 1, round(bottom * y) - 1


def _at_point(found: dict[str, Routes], shown: Images, point: Point | None) -> tuple[dict, dict]:
    """A picture for each image: as it is, then what each layer visits from the point."""
    pictures, captions = {}, {}
    for i, (picture, name) in enumerate(zip(shown.shown, shown.names, strict=True)):
        panels = [(enlarged(picture), name)]
        for layer, one in found.items():
            asking = region_at(point, one.regions, one.grid)
            panels.append((drawn(picture, one, asking, one.routes_BRK[i, asking].tolist()), layer))
        width = -(-len(panels) // -(-len(panels) // MOST))  # of lines of nearly the same length
        pictures[name] = sheet([panels[first : first + width] for first in range(0, len(panels), width)])
        captions[name] = f"{name}: the orange region attends to the blue ones, the best match the strongest."
    return pictures, captions


def _of_every(found: dict[str, Routes], shown: Images, every: int) -> tuple[dict, dict]:
    """A picture for each layer: a row for each image, a panel for each region that asks."""
    pictures, captions = {}, {}
    for layer, one in found.items():
        R, rows = one.routes_BRK.shape[1], []
        asking = range(min(every // 2, R - 1), R, every)
        for picture, name, routes_RK in zip(shown.shown, shown.names, one.routes_BRK.tolist(), strict=True):
            panels = [(drawn(picture, one, region, routes_RK[region]), f"region {region}") for region in asking]
            rows.append([(enlarged(picture), name), *panels])
        pictures[f"routes-{layer}"] = sheet(rows)
        captions[f"routes-{layer}"] = f"{layer}: orange regions attend to the blue ones, the best match the strongest."
    return pictures, captions


def _told(one: Routes) -> str:
    sums = summed(one)
    return f"{sums['visited']} of {sums['regions']} regions, {sums['own']:.0%} see themselves, {sums['seen']:.0%} seen"


def _table(name: str, one: Routes, images: list[str]) -> list[dict[str, Any]]:
    """A row for each image and region; what it visits, best first, as numbers of regions."""
    return [
        {
            "layer": name,
            "image": image,
            "region": region,
            "row": region // one.regions.columns,
            "column": region % one.regions.columns,
            "visits": " ".join(map(str, visited)),
        }
        for image, routes_RK in zip(images, one.routes_BRK.tolist(), strict=True)
        for region, visited in enumerate(routes_RK)
    ]


def _beyond(found: dict[str, Routes]) -> list[str]:
    """A sentence for each layer in which regions of padding are attended to."""
    lines = []
    for name, one in found.items():
        empty = [r for r in range(one.routes_BRK.shape[1]) if _box(r, one, one.grid[1::-1]) is None]
        share = torch.isin(one.routes_BRK, torch.tensor(empty, dtype=torch.int64)).float().mean().item()
        if share:
            lines.append(f"{name}: {share:.0%} of the routes lead to padding beyond the map, which is not drawn")
    return lines
