"""Which slot has which place: the tokens for which slots compete, coloured by who has most of them.

Shapes: B = images, Q = slots, H W = map.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from conf.errors import UserError
from models.backbones.base import check_places
from models.pools.slot import SlotPool
from models.probes import Report
from models.probes.clusters import coloured
from models.probes.drawing.overlays import enlarged, overlay, sheet
from models.probes.reading.images import Images, first_images

WHO = "slots"


def slots(
    model: nn.Module, data: pl.LightningDataModule, trainer: pl.Trainer, input: Any = None, images: int = 4
) -> Report:
    """A row for each image: the picture, its cells in the colours of their slots, and the shares of each slot.

    Args:
        model, data, trainer, input: see `models.probes`.
        images: how many pictures.

    Raises:
        UserError: an option that has no meaning, or a model without slots.
    """
    if getattr(model, "latent", False):
        check_places(model, WHO)
    if not isinstance(pool := getattr(model, "pooling", None), SlotPool):
        got = type(model).__name__ if pool is None else type(pool).__name__
        raise UserError(f"{WHO}: {got} has no slots; choose a model that was trained with pool=slot")
    seen = first_images(data, images, trainer.strategy.root_device)
    shares_BQHW = shares_of(model, seen.batch)
    had_BQ = shares_BQHW.mean((-2, -1))
    surest = shares_BQHW.amax(1).mean().item()
    table = [
        {"image": name, "slot": slot, "share": share, "first_in": first}
        for name, of_image, firsts in zip(seen.names, had_BQ.tolist(), _firsts(shares_BQHW).tolist(), strict=True)
        for slot, (share, first) in enumerate(zip(of_image, firsts, strict=True))
    ]
    return Report(
        {"slots": shares_BQHW.shape[1], "largest_share": surest}
        | {f"slot_{slot}/share": share for slot, share in enumerate(had_BQ.mean(0).tolist())},
        tables={"slots": table},
        pictures={"slots": sheet(_rows(shares_BQHW, seen))},
        captions={"slots": "Cells in the colour of the slot that has most of them, then how much each slot has."},
    )


@torch.no_grad()
def shares_of(model: nn.Module, batch: Tensor) -> Tensor:
    """(B, Q, H, W): how the slots share every cell in the last round; they sum to one over the slots."""
    x_BNC, grid, _ = model.forward_tokens(batch)
    shares_BQS = model.pooling.slots(x_BNC, grid)[1].float().cpu()
    return (shares_BQS / shares_BQS.sum(1, keepdim=True)).unflatten(-1, grid[:2])


def _firsts(shares_BQHW: Tensor) -> Tensor:
    """(B, Q): the share of cells of which a slot has the most."""
    first = shares_BQHW.argmax(1)
    return torch.stack([(first == slot).float().mean((-2, -1)) for slot in range(shares_BQHW.shape[1])], dim=1)


def _rows(shares_BQHW: Tensor, seen: Images) -> list:
    rows = []
    for picture, name, shares_QHW in zip(seen.shown, seen.names, shares_BQHW, strict=True):
        regions = coloured(picture, shares_QHW.argmax(0).numpy(), len(shares_QHW))
        panels = [(overlay(picture, share_HW), f"slot {slot}") for slot, share_HW in enumerate(shares_QHW)]
        rows.append([(enlarged(picture), name), (regions, "slots"), *panels])
    return rows
