"""How much a pool takes of each place: the weights of each of its queries over the picture.

Shapes: B = images, Q = queries, S = tokens that are pooled, the last H·W of which are the map, K = classes.
"""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf.errors import UserError
from conf.values import refuse, whole
from models.backbones.base import check_places
from models.layers.grid import Grid
from models.layers.pooled import Pool
from models.probes import Report
from models.probes.drawing.overlays import MOST, enlarged, overlay, sheet
from models.probes.reading.images import Images, first_images

WHO = "pool_map"


class Maps(NamedTuple):
    """weights: (B, Q, H, W), the share of a query's weight that falls on each cell. on_prefix: (B, Q), on class tokens.
    classes: (B, Q), where every query is that of a class, these in the order of their logits; None otherwise."""

    weights: Tensor
    on_prefix: Tensor
    classes: Tensor | None


def pool_map(
    model: nn.Module,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    input: Any = None,
    images: int = 4,
    queries: int = 8,
) -> Report:
    """A row for each image, a panel for each query.

    Args:
        model, data, trainer, input: see `models.probes`.
        images: how many pictures.
        queries: panels of each: the first queries, or those of the most probable classes.

    Raises:
        UserError: an option that has no meaning, or a model whose pool has no weights.
    """
    if whole("probe", "queries", queries, fix="set probe.queries=8") >= MOST:
        refuse("probe", "queries", f"at most {MOST - 1}", queries, "set probe.queries=8")
    if getattr(model, "latent", False):
        check_places(model, WHO)
    pool = pool_of(WHO, model)
    seen = first_images(data, images, trainer.strategy.root_device)
    found = maps_of(model, seen.batch)
    entropy_BQ = torch.special.entr(found.weights.flatten(2)).sum(-1)
    figures = {
        "queries": found.weights.shape[1],
        "entropy": entropy_BQ.mean().item(),
        "largest": found.weights.amax((-2, -1)).mean().item(),
        "on_class_tokens": found.on_prefix.mean().item(),
    }
    who = type(pool).__name__
    return Report(
        figures,
        rows={"pool": who, "queries": figures["queries"], "entropy, nats": f"{figures['entropy']:.3f}"},
        tables={"queries": _table(found, entropy_BQ, seen.names, list(map(str, data.class_names)))},
        pictures={"pool_map": sheet(_rows(found, seen, queries, list(map(str, data.class_names))))},
        captions={"pool_map": f"How much {who} takes of each place, a panel for each query."},
    )


def pool_of(who: str, model: nn.Module) -> Pool:
    """The pool of a model.

    Raises:
        UserError: one whose weights are no question, or none at all.
    """
    pool = getattr(model, "pooling", None)
    if isinstance(pool, Pool) and pool.has_weights:
        return pool
    if not hasattr(model, "forward_tokens"):
        what = f"{type(model).__name__} has no pool of tokens"
    elif pool is None:
        what = f"the pool of {type(model).__name__} (its mean or its class token) has no weights"
    else:
        what = f"{type(pool).__name__} has no weights"
    raise UserError(f"{who}: {what}; choose a model that was trained with e.g. pool=simpool")


@torch.no_grad()
def maps_of(model: nn.Module, batch: Tensor) -> Maps:
    """The weights of the queries of a model's pool for a batch of images, by the most probable classes first."""
    x_BNC, grid, _ = model.forward_tokens(batch)
    pooled = model.pooled(x_BNC, grid)
    weights_BQS, classes_BQ = pooled.weights.float(), None
    if pooled.x.dim() == 3:  # a query for each class
        classes_BQ = model.head(pooled.x).argsort(dim=-1, descending=True)
        weights_BQS = weights_BQS.gather(1, classes_BQ[..., None].expand_as(weights_BQS))
    on_map_BQHW = _map(weights_BQS, grid)
    on_prefix_BQ = weights_BQS[..., : weights_BQS.shape[-1] - grid.cells].sum(-1)
    return Maps(on_map_BQHW.cpu(), on_prefix_BQ.cpu(), None if classes_BQ is None else classes_BQ.cpu())


def _map(weights_BQS: Tensor, grid: Grid) -> Tensor:
    return weights_BQS[..., weights_BQS.shape[-1] - grid.cells :].unflatten(-1, grid[:2])


def _name(found: Maps, image: int, query: int, classes: list[str]) -> str:
    """ "query 3", or the class that it asks for."""
    if found.classes is None:
        return f"query {query}"
    label = int(found.classes[image, query])
    return classes[label] if label < len(classes) else f"class {label}"


def _rows(found: Maps, seen: Images, most: int, classes: list[str]) -> list:
    rows = []
    for i, (picture, name) in enumerate(zip(seen.shown, seen.names, strict=True)):
        panels = [
            (overlay(picture, weights_HW), _name(found, i, query, classes))
            for query, weights_HW in enumerate(found.weights[i, :most])
        ]
        rows.append([(enlarged(picture), name), *panels])
    return rows


def _table(found: Maps, entropy_BQ: Tensor, images: list[str], classes: list[str]) -> list[dict[str, Any]]:
    """A row for each image and query: entropy in nats, the largest weight of a cell, and where that is."""
    width = found.weights.shape[-1]
    rows = []
    for i, image in enumerate(images):
        for query, weights_HW in enumerate(found.weights[i]):
            row, column = divmod(int(weights_HW.argmax()), width)
            rows.append(
                {"image": image, "query": _name(found, i, query, classes), "entropy": entropy_BQ[i, query].item()}
                | {"largest": weights_HW.max().item(), "row": row, "column": column}
            )
    return rows
