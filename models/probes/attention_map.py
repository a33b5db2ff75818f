"""Where a point of an image attends, over the picture: layer by layer, head by head, of any mechanism with weights.

Windows, stripes, neighbourhoods and clusters are put back on the map; of linear attention these are the weights that
its factors imply, some of which may be negative (they are left dark); shortened keys cover the tokens they stand for.
Shapes: B = images, M = heads, N = prefix + H·W tokens.
"""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf import looking
from conf.errors import UserError
from conf.looking import Point
from conf.values import is_whole, whole
from models.attention import Grid, Mixer
from models.attention.recording import Call, recorded
from models.backbones.base import check_places
from models.probes import Report
from models.probes.drawing.overlays import enlarged, overlay, sheet
from models.probes.reading.heads import HEADS, check_head, check_heads
from models.probes.reading.images import Images, first_images
from models.probes.reading.layers import chosen_layers
from models.probes.reading.points import token_at


class Row(NamedTuple):
    """The weights (B, M, H, W) of one token on the map of a layer, and on the class tokens (B, M)."""

    weights: Tensor
    on_prefix: Tensor


def attention_map(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    input: Any = None,
    images: int = 4,
    layers: Any = "all",
    heads: str | int = "each",
    point: Any = None,
    max_tokens: int = 4096,
) -> Report:
    """A picture for each image: its layers from top to bottom, the mean over heads and the heads from left to right.

    Args:
        model, data, trainer, input: see `models.probes`.
        images: how many of those that there are.
        layers: see `models.probes.reading.layers.chosen_layers`.
        heads: "each", "mean" or the number of one.
        point: fractions from the left and from the top; None: the class token, without one the centre.
        max_tokens: of the map of a layer.

    Raises:
        UserError: an option that cannot be; no layer, or an asked one, that has weights.
    """
    check_heads(heads)
    point = looking.point(point)
    whole("probe", "max_tokens", max_tokens, fix="set probe.max_tokens")
    check_places(model, "attention_map")
    mixers = chosen_layers("attention_map", model, layers)
    seen = first_images(data, images, trainer.strategy.root_device)
    with torch.no_grad(), recorded(model) as calls:
        model(seen.batch)
    check_tokens({name: calls[name].grid for name in mixers}, max_tokens)
    rows = {name: row_of(mixer, calls[name], point) for name, mixer in mixers.items()}
    check_head(heads, {name: row.weights.shape[1] for name, row in rows.items()})
    prefix = any(calls[name].grid.prefix for name in mixers)
    marked = None if point is None and prefix else point or (0.5, 0.5)
    asked = (
        "the class token"
        if marked is None
        else f"the point {marked[0]:.2f} from the left, {marked[1]:.2f} from the top"
    )
    captions = {name: f"{name}: where {asked} attends, layer by layer" for name in seen.names}
    return Report(
        {f"{name}/{key}": value for name, row in rows.items() for key, value in figures_of(row).items()},
        rows={},
        tables={"layers": [{"layer": name, **figures_of(row)} for name, row in rows.items()]},
        pictures={name: _picture(seen, number, rows, heads, marked) for number, name in enumerate(seen.names)},
        captions=captions,
        lines=[f"where {asked} attends, in {len(rows)} layers of {len(seen.names)} images"],
    )


@torch.no_grad()
def row_of(mixer: Mixer, call: Call, point: Point | None) -> Row:
    """The weights of the token at a point, or of the first class token, else of the centre.

    Image by image, since those of all other tokens come with them.
    """
    grid, token = call.grid, token_at(point, call.grid)
    rows = []
    for image, x_NC in enumerate(call.x_BNC):
        named = {name: value[image : image + 1] for name, value in call.named.items()}
        rows.append(mixer.token_weights(x_NC[None], grid, **named).on_tokens()[:, :, token])
    row_BMN = torch.cat(rows).float()
    return Row(row_BMN[..., grid.prefix :].unflatten(-1, grid[:2]), row_BMN[..., : grid.prefix].sum(-1))


def figures_of(row: Row) -> dict[str, float]:
    """Of a layer: entropy of the row in nats and its largest weight, means over images and heads; and what the class
    tokens get, where there are any."""
    flat = row.weights.flatten(2).clamp_min(0)
    share = flat / flat.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1).mean()
    found = {"entropy": float(entropy), "largest": float(flat.amax(-1).mean())}
    return found | ({"on_class_tokens": float(row.on_prefix.mean())} if row.on_prefix.any() else {})


def check_tokens(grids: dict[str, Grid], most: int) -> None:
    """Refuses layers whose weights of all pairs would fill the memory."""
    for name, grid in grids.items():
        if grid.tokens > most:
            raise UserError(
                f"probe: {name} has {grid.tokens} tokens, whose weights on one another are {grid.tokens**2:,} numbers "
                f"per head and image, more than max_tokens={most} allows; choose other probe.layers, a smaller "
                "image_size, or raise probe.max_tokens"
            )


def _picture(seen: Images, number: int, rows: dict[str, Row], heads: str | int, point: Point | None) -> Any:
    picture, panels = seen.shown[number], []
    for name, row in rows.items():
        maps_MHW = row.weights[number]
        chosen = [("mean", maps_MHW.mean(0))] if heads in HEADS else []
        numbers = range(len(maps_MHW)) if heads == "each" else [heads] if is_whole(heads, 0) else []
        chosen += [(f"head {head}", maps_MHW[head]) for head in numbers]
        drawn = [(overlay(picture, weights, point=point), word) for word, weights in chosen]
        panels.append([(enlarged(picture), name), *drawn])
    return sheet(panels)
